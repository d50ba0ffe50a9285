#include "routes.h"

namespace molae {

const int64_t* checked_index(const Tensor& index, int64_t T, int64_t K, int64_t E) {
  const int64_t* experts = index.as<int64_t>();
  for (int64_t slot = 0; slot < T * K; ++slot)
    if (experts[slot] < 0 || experts[slot] > E)
      fail("the input '", index.name, "' is ", experts[slot], " for token ", slot / K, ", expected 0 to ", E, " (", E,
           ": no expert of this bank)");
  return experts;
}

Rows::Rows(const int64_t* index, int64_t T, int64_t K, int64_t E, int64_t experts_per_group)
    : of_slot(static_cast<size_t>(T * K), -1) {
  const int64_t groups = E / experts_per_group;
  std::vector<int64_t> last(static_cast<size_t>(groups), -1), next(static_cast<size_t>(groups), 0);
  auto for_each = [&](auto&& body) {  // slot, group, and whether the token is new to the group
    std::fill(last.begin(), last.end(), int64_t{-1});
    for (int64_t slot = 0; slot < T * K; ++slot) {
      if (index[slot] == E) continue;
      const int64_t group = index[slot] / experts_per_group;
      body(slot, group, last[group] != slot / K);
      last[group] = slot / K;
    }
  };
  for_each([&](int64_t, int64_t group, bool is_new) { next[group] += is_new; });
  int64_t total = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t size = next[g];
    if (size > 0) segments.push_back({g, total, total + size});
    next[g] = total - 1;
    total += size;
  }
  token.resize(static_cast<size_t>(total));
  for_each([&](int64_t slot, int64_t group, bool is_new) {
    next[group] += is_new;
    token[next[group]] = slot / K;
    of_slot[slot] = next[group];
  });
}

std::vector<int64_t> matching(const Rows& fine, const Rows& coarse) {
  std::vector<int64_t> rows(fine.token.size());
  for (size_t slot = 0; slot < fine.of_slot.size(); ++slot)
    if (fine.of_slot[slot] >= 0) rows[fine.of_slot[slot]] = coarse.of_slot[slot];
  return rows;
}

Columns::Columns(const Tensor& pivots, const std::vector<Segment>& segments, int64_t R, int64_t H) : present_(pivots.present) {
  if (!present_ || segments.empty()) return;
  rest_.resize(segments.size() * static_cast<size_t>(H - R));
  segment_of_row_.resize(static_cast<size_t>(segments.back().end));
  int32_t* rest = rest_.data();
  for (const Segment& segment : segments) {
    const int32_t* own = pivots.as<int32_t>() + segment.group * R;
    std::fill(segment_of_row_.begin() + segment.begin, segment_of_row_.begin() + segment.end, groups_.size());
    groups_.push_back({own, rest});
    int64_t column = 0;
    for (int64_t i = 0; i < R; ++i) {
      const int64_t highest = H - R + i;  // leaves room for the pivots behind it
      if (own[i] < column || own[i] > highest)
        fail("the input '", pivots.name, "' is ", own[i], " at ", segment.group * R + i, ", expected ", column, " to ", highest,
             ": pivots ascend in a group, below ", H);
      while (column < own[i]) *rest++ = static_cast<int32_t>(column++);
      ++column;
    }
    while (column < H) *rest++ = static_cast<int32_t>(column++);
  }
}

}  // namespace molae
