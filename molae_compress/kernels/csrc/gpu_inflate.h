// Unpacks the embedded kernels: raw DEFLATE streams (RFC 1951), as Python's zlib writes them. The data is our own, made by the
// same build; a damaged stream ends in `false`, never outside of the buffers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace molae_gpu {

class Inflate {
 public:
  Inflate(const unsigned char* in, size_t in_size, unsigned char* out, size_t out_size)
      : in_(in), in_end_(in + in_size), out_(out), at_(0), out_size_(out_size) {}

  // True if the stream was sound and filled the output exactly.
  bool run() {
    bool last = false;
    while (!last && sound_) {
      last = bits(1);
      switch (bits(2)) {
        case 0: stored(); break;
        case 1: fixed(); break;
        case 2: dynamic(); break;
        default: sound_ = false;
      }
    }
    return sound_ && at_ == out_size_;
  }

 private:
  static constexpr int kLongest = 15, kLengths = 288, kDistances = 32;

  // A canonical Huffman code: how many codes of each length there are, and the symbols in order of their codes.
  struct Code {
    uint16_t count[kLongest + 1];
    uint16_t symbol[kLengths];
    void build(const uint8_t* length, int symbols) {
      for (auto& c : count) c = 0;
      for (int s = 0; s < symbols; ++s) ++count[length[s]];
      count[0] = 0;
      uint16_t next[kLongest + 2] = {};
      for (int l = 1; l <= kLongest; ++l) next[l + 1] = next[l] + count[l];
      for (int s = 0; s < symbols; ++s)
        if (length[s]) symbol[next[length[s]]++] = static_cast<uint16_t>(s);
    }
  };

  unsigned bits(int count) {
    while (held_ < count) {
      if (in_ == in_end_) {
        sound_ = false;
        return 0;
      }
      hold_ |= static_cast<uint32_t>(*in_++) << held_;
      held_ += 8;
    }
    unsigned value = hold_ & ((1u << count) - 1);
    hold_ >>= count;
    held_ -= count;
    return value;
  }

  int decode(const Code& code) {
    int value = 0, first = 0, index = 0;
    for (int l = 1; l <= kLongest && sound_; ++l) {
      value |= static_cast<int>(bits(1));
      int count = code.count[l];
      if (value - first < count) return code.symbol[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    sound_ = false;
    return 0;
  }

  void put(unsigned char byte) {
    if (at_ < out_size_)
      out_[at_++] = byte;
    else
      sound_ = false;
  }

  void stored() {
    hold_ = 0;
    held_ = 0;
    unsigned size = bits(16), check = bits(16);
    if (size != (~check & 0xffff)) sound_ = false;
    for (unsigned i = 0; i < size && sound_; ++i) put(static_cast<unsigned char>(bits(8)));
  }

  void fixed() {
    uint8_t length[kLengths];
    for (int s = 0; s < kLengths; ++s) length[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    lengths_.build(length, kLengths);
    for (int s = 0; s < kDistances; ++s) length[s] = 5;
    distances_.build(length, kDistances);
    symbols();
  }

  void dynamic() {
    static constexpr uint8_t kOrder[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    int literals = static_cast<int>(bits(5)) + 257, distances = static_cast<int>(bits(5)) + 1, used = static_cast<int>(bits(4)) + 4;
    uint8_t length[kLengths + kDistances] = {};
    for (int i = 0; i < used; ++i) length[kOrder[i]] = static_cast<uint8_t>(bits(3));
    lengths_.build(length, 19);
    for (auto& l : length) l = 0;
    for (int i = 0; i < literals + distances && sound_;) {
      int symbol = decode(lengths_), repeat = 1;
      uint8_t value = static_cast<uint8_t>(symbol);
      if (symbol == 16) {
        value = i ? length[i - 1] : 0;
        repeat = 3 + static_cast<int>(bits(2));
      } else if (symbol >= 17) {
        value = 0;
        repeat = symbol == 17 ? 3 + static_cast<int>(bits(3)) : 11 + static_cast<int>(bits(7));
      }
      if (i + repeat > literals + distances || literals > kLengths) {
        sound_ = false;
        return;
      }
      while (repeat--) length[i++] = value;
    }
    lengths_.build(length, literals);
    distances_.build(length + literals, distances);
    symbols();
  }

  void symbols() {
    static constexpr uint16_t kBase[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                           31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static constexpr uint8_t kExtra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static constexpr uint16_t kFar[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                          193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    static constexpr uint8_t kFarExtra[30] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                              6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
    while (sound_) {
      int symbol = decode(lengths_);
      if (symbol < 256) {
        put(static_cast<unsigned char>(symbol));
        continue;
      }
      if (symbol == 256) return;
      symbol -= 257;
      if (symbol >= 29) break;
      size_t size = kBase[symbol] + bits(kExtra[symbol]);
      int far = decode(distances_);
      if (far >= 30) break;
      size_t back = kFar[far] + bits(kFarExtra[far]);
      if (back > at_) break;
      while (size-- && sound_) put(out_[at_ - back]);
    }
    sound_ = false;
  }

  const unsigned char *in_, *in_end_;
  unsigned char* out_;
  size_t at_, out_size_;
  uint32_t hold_ = 0;
  int held_ = 0;
  bool sound_ = true;
  Code lengths_, distances_;
};

}  // namespace molae_gpu
