// A seeded pseudo-random permutation of 0 .. n - 1 that needs no memory.
//
//   permuted(i) = the first of F(i), F(F(i)), ... that is below n
//
// F is a balanced Feistel network on the next even power of two: (left, right) becomes
// (right, left ^ mix(right, key of the round)). Every F is one to one, so walking its cycle until
// the value is inside is one to one as well, in less than four steps on average. Over seeds, every
// index comes to every position and every pair to every pair of positions equally often; orders of
// all n do not quite, for n of 5 to about 16: networks give even permutations only.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dreamreader {

constexpr int kPermutationRounds = 8;
constexpr int64_t kPermutationMost = int64_t{1} << 62;  // n may not be larger

// The finaliser of splitmix64: every bit of the input reaches every bit of the result.
DR_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Permutation {
 public:
  DR_HD Permutation(int64_t n, uint64_t seed) : n_(uint64_t(n)) {
    half_ = 1;
    while (half_ < 31 && (n_ - 1) >> (2 * half_)) ++half_;
    mask_ = (uint64_t{1} << half_) - 1;
    for (int r = 0; r < kPermutationRounds; ++r)
      keys_[r] = mix64(seed + uint64_t(r + 1) * 0x9e3779b97f4a7c15u);
  }

  // One step of the walk; the end of it is where the value is below n.
  DR_HD uint64_t step(uint64_t value) const {
    uint64_t left = value >> half_, right = value & mask_;
#pragma GCC unroll 8
    for (int r = 0; r < kPermutationRounds; ++r) {
      const uint64_t next = left ^ (mix64(right ^ keys_[r]) & mask_);
      left = right;
      right = next;
    }
    return left << half_ | right;
  }

  DR_HD int64_t operator()(int64_t index) const {
    uint64_t value = uint64_t(index);
    do {
      value = step(value);
    } while (value >= n_);
    return int64_t(value);
  }

  DR_HD uint64_t size() const { return n_; }

 private:
  uint64_t n_, mask_, keys_[kPermutationRounds];
  int half_;
};

// Where index, 0 .. n - 1, goes; for many indices of one permutation keep the class.
DR_HD int64_t permuted(int64_t index, int64_t n, uint64_t seed) {
  return Permutation(n, seed)(index);
}

}  // namespace dreamreader
