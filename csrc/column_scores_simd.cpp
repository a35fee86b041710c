// Scores of columns for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
#include "column_scores.h"
#include "doubles_simd.h"

namespace dreamreader {
namespace {

typedef uint64_t VB __attribute__((vector_size(DR_VECTOR_BYTES)));

DR_INLINE VD active(VD x) { return x < 0.0 ? VD{} : x; }  // NaN stays

// Natural logarithm of positive numbers: x = m 2^e with m from sqrt(1/2) to sqrt(2), and the series
// of log(m) = 2 atanh((m - 1) / (m + 1)), to 1e-9 of it.
DR_INLINE VD log_lanes(VD x) {
  const VD scaled = x < 0x1p-1022 ? x * 0x1p52 : x;
  const VB bits = bits_as<VB>(scaled);
  const VB shifted = bits - 0x3fe6a09e667f3bcdull;  // bits of sqrt(1/2)
  typedef int64_t VI __attribute__((vector_size(DR_VECTOR_BYTES)));
  const VI exponent = bits_as<VI>(shifted) >> 52;
  VD e = __builtin_convertvector(exponent, VD);
  e = x < 0x1p-1022 ? e - 52.0 : e;
  const VD m = bits_as<VD>(bits - bits_as<VB>(exponent << 52));
  const VD s = (m - 1.0) / (m + 1.0), q = s * s;
  const VD series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9))));
  return e * 0.693147180559945309417 + 2.0 * s * series;
}

DR_INLINE bool any_positive(VD x) {
  const auto yes = x > 0.0;
  int64_t any = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kDoubles; ++i) any |= yes[i];
  return any != 0;
}

template <typename T>
DR_INLINE VD load_part(const T* x, int64_t n) {  // the first n lanes, the rest 0
  T part[kDoubles];
  __builtin_memset(part, 0, sizeof(part));
  __builtin_memcpy(part, x, std::size_t(n) * sizeof(T));
  return load_doubles(part);
}

template <typename T, bool kLogs>
DR_INLINE void run(const ColumnScoresJob& job, int64_t begin, int64_t end) {
  constexpr int kRows = 4;  // whose terms are added before they enter the sums
  for (int64_t item = begin; item < end; ++item) {
    const int64_t piece = item / job.tiles, column = item % job.tiles * kScoresTile;
    const int64_t left = job.columns - column, width = left < kScoresTile ? left : kScoresTile;
    double first[kScoresTile + kDoubles] = {}, second[kScoresTile + kDoubles] = {};
    const int64_t start = piece * job.piece_rows;
    const int64_t stop = start + job.piece_rows < job.rows ? start + job.piece_rows : job.rows;
    for (int64_t row = start; row < stop; row += kRows) {
      const int64_t n = stop - row < kRows ? stop - row : kRows;
      const T* x = reinterpret_cast<const T*>(job.x) + row * job.stride_row + column;
      for (int64_t c = 0; c < width; c += kDoubles) {
        VD sum{}, logs{};
        for (int64_t r = 0; r < n; ++r) {
          const T* from = x + r * job.stride_row + c;
          const VD a =
              active(width - c < kDoubles ? load_part(from, width - c) : load_doubles(from));
          if constexpr (kLogs) {
            sum += a;
            if (any_positive(a)) logs += a > 0.0 ? a * log_lanes(a) : VD{};
          } else {
            sum += a * a;
          }
        }
        store_vector(first + c, load_vector<VD>(first + c) + sum);
        if constexpr (kLogs) store_vector(second + c, load_vector<VD>(second + c) + logs);
      }
    }
    const int64_t to = piece * job.columns + column;
    __builtin_memcpy(job.first + to, first, std::size_t(width) * sizeof(double));
    if constexpr (kLogs)
      __builtin_memcpy(job.second + to, second, std::size_t(width) * sizeof(double));
  }
}

template <typename T>
void squares(const ColumnScoresJob& job, int64_t begin, int64_t end) {
  run<T, false>(job, begin, end);
}
template <typename T>
void logs(const ColumnScoresJob& job, int64_t begin, int64_t end) {
  run<T, true>(job, begin, end);
}

}  // namespace

namespace DR_ISA {

extern const ColumnScoresKernels column_scores;
const ColumnScoresKernels column_scores = {DR_BY_TYPE(squares), DR_BY_TYPE(logs)};

}  // namespace DR_ISA
}  // namespace dreamreader
