// Which rows are computed for which tokens. A slot (t, k) is the k-th expert of token t, number t * K + k; its expert may be E:
// none of this bank.
#pragma once

#include <vector>

#include "grouped.h"

namespace molae {

// The numbers of `index` [T,K]; throws unless all of them are between 0 and E.
const int64_t* checked_index(const Tensor& index, int64_t T, int64_t K, int64_t E);

// One row for each token and each group of `experts_per_group` neighbouring experts that it uses, sorted by group, then token.
struct Rows {
  Rows(const int64_t* index, int64_t T, int64_t K, int64_t E, int64_t experts_per_group);

  std::vector<int64_t> token;    // of each row
  std::vector<int64_t> of_slot;  // the row of each slot, -1 where its expert is none of the bank
  std::vector<Segment> segments;

  int64_t count() const { return static_cast<int64_t>(token.size()); }
  // Rows ascend with their tokens within a group, so as many rows as tokens in one group are the tokens themselves.
  bool are_all_tokens(int64_t T) const { return segments.size() == 1 && count() == T; }

  // Calls `body(slot, row)` once for each row of the token whose slots begin at `first`.
  template <class Body>
  void for_each_of_token(int64_t first, int64_t K, Body&& body) const {
    for (int64_t slot = first; slot < first + K; ++slot) {
      bool is_new = of_slot[slot] >= 0;
      for (int64_t earlier = first; earlier < slot && is_new; ++earlier) is_new = of_slot[earlier] != of_slot[slot];
      if (is_new) body(slot, of_slot[slot]);
    }
  }
};

// For each row of `fine`, the row of `coarse` that holds its token and expert.
std::vector<int64_t> matching(const Rows& fine, const Rows& coarse);

// The columns of the interpolative bases that rows use: those of the identity, and the others.
class Columns {
 public:
  struct Group {
    const int32_t* pivots;
    const int32_t* rest;
  };

  // Absent pivots: an orthonormal basis, and no columns. Throws unless the pivots of each group ascend between 0 and H - 1.
  Columns(const Tensor& pivots, const std::vector<Segment>& segments, int64_t R, int64_t H);

  bool empty() const { return !present_; }
  const Group& of_row(int64_t row) const { return groups_[static_cast<size_t>(segment_of_row_[static_cast<size_t>(row)])]; }

 private:
  bool present_;
  std::vector<int32_t> rest_;
  std::vector<int64_t> segment_of_row_;
  std::vector<Group> groups_;
};

}  // namespace molae
