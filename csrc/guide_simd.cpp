// Guidance by a probe for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
#include "guide_tile_simd.h"

namespace dreamreader {
namespace {

constexpr int64_t kChunk = kBlock<float>;

// What a block of rows works on; [rows, ld] unless said otherwise.
template <typename T>
struct GuideBlock {
  const GuideJob& job;
  const int64_t* numbers;
  const float* strength;
  int64_t count, rows;  // in use, and with those that fill the last tile
  float* x;             // [rows, ld_row], first h, then y
  float *a, *p, *e, *v, *slope;
  float* next;  // [rows, ld_second]

  GuideBlock(const GuideJob& job, float* scratch, int64_t first, int64_t last)
      : job(job), numbers(job.rows + first), strength(job.strength + first), count(last - first) {
    rows = (count + kRows - 1) / kRows * kRows;
    float** const parts[] = {&x, &a, &p, &e, &v, &slope, &next};
    for (float** part : parts) {
      *part = scratch;
      scratch += rows * (part == &x ? job.ld_row : part == &next ? job.ld_second : job.ld);
    }
  }

  // Rows that only fill a tile repeat the last one, with strength 0.
  int64_t entry(int64_t r) const { return numbers[r < count ? r : count - 1] / job.x.tokens; }

  T* row(const StridedRows& of, int64_t r) const {
    return row_at<T>(of, numbers[r] / of.tokens, numbers[r] % of.tokens);
  }

  // Whether the rows from r on are a vector side by side in memory.
  bool side_by_side(const StridedRows& of, int64_t r) const {
    constexpr int64_t n = kLanes;
    return r + n <= count && of.stride_token == 1 && numbers[r + n - 1] == numbers[r] + n - 1 &&
           numbers[r] % job.x.tokens + n <= job.x.tokens;
  }

  void load_rows() {
    if (job.x.stride_channel == 1) {
      for (int64_t r = 0; r < count; ++r) {
        const T* from = row(job.x, r);
        for (int64_t d = 0; d < job.x.width; d += kChunk)
          store(x + r * job.ld_row + d, load<float>(from + d, job.x.width - d), job.x.width - d);
      }
    } else {
      for (int64_t r = 0; r < count; r += kLanes)
        for (int64_t d = 0; d < job.x.width; d += kLanes) load_square(r, d);
    }
    __builtin_memset(x + count * job.ld_row, 0,
                     std::size_t((rows - count) * job.ld_row) * sizeof(float));
  }

  void store_rows() {
    if (job.out.stride_channel == 1) {
      for (int64_t r = 0; r < count; ++r) {
        T* to = row(job.out, r);
        for (int64_t d = 0; d < job.x.width; d += kChunk)
          store(to + d, load<float>(x + r * job.ld_row + d, job.x.width - d), job.x.width - d);
      }
    } else {
      for (int64_t r = 0; r < count; r += kLanes)
        for (int64_t d = 0; d < job.x.width; d += kLanes) store_square(r, d);
    }
  }

  // Features that lie apart are read for a vector of rows at once: neighbours share cache lines.
  void load_square(int64_t r, int64_t d) {
    const int64_t n = count - r < kLanes ? count - r : kLanes, stride = job.x.stride_channel;
    const int64_t features = job.x.width - d < kLanes ? job.x.width - d : kLanes;
    const bool vectors = side_by_side(job.x, r);
    VF square[kLanes] = {};
    for (int64_t i = 0; i < features; ++i) {
      T part[kLanes] = {};
      for (int64_t j = 0; !vectors && j < n; ++j) part[j] = row(job.x, r + j)[(d + i) * stride];
      square[i] = load_lanes(vectors ? row(job.x, r) + (d + i) * stride : part);
    }
    transpose_lanes(square);
    for (int64_t j = 0; j < n; ++j) store_vector(x + (r + j) * job.ld_row + d, square[j]);
  }

  void store_square(int64_t r, int64_t d) {
    const int64_t n = count - r < kLanes ? count - r : kLanes, stride = job.out.stride_channel;
    const int64_t features = job.x.width - d < kLanes ? job.x.width - d : kLanes;
    const bool vectors = side_by_side(job.out, r);
    VF square[kLanes] = {};
    for (int64_t j = 0; j < n; ++j) square[j] = load_vector<VF>(x + (r + j) * job.ld_row + d);
    transpose_lanes(square);
    for (int64_t i = 0; i < features; ++i) {
      T part[kLanes];
      store_lanes(vectors ? row(job.out, r) + (d + i) * stride : part, square[i]);
      for (int64_t j = 0; !vectors && j < n; ++j) row(job.out, r + j)[(d + i) * stride] = part[j];
    }
  }

  void clear(float* table) {
    __builtin_memset(table, 0, std::size_t(rows * job.ld) * sizeof(float));
  }

  // Rows from a table with one for each batch entry, or one for all (stride 0).
  void fill(float* to, int64_t ld, const float* table, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(to + r * ld, table + entry(r) * stride, std::size_t(ld) * sizeof(float));
  }

  void product(float* to, int64_t ld, const float* from, int64_t ld_from, GuideMatrices which) {
    multiply<false>(from, ld_from, job.matrices[which], rows, to, ld);
  }

  template <Activated (*kActivated)(VF)>
  void step(double gamma) {
    for (int64_t r = 0; r < rows; ++r) {
      const float s = r < count ? strength[r] * float(gamma) : 0.0f;
      const float* head = job.head + entry(r) * job.ld_head;
      for (int64_t j = r * job.ld; j < r * job.ld + job.hidden; j += kLanes, head += kLanes) {
        if (job.layers == 1) {
          store_vector(v + j, load_vector<VF>(head) * s);
          continue;
        }
        const Activated found = kActivated(load_vector<VF>(a + j) - load_vector<VF>(p + j));
        if (job.layers == 2) {
          store_vector(v + j, load_vector<VF>(head) * found.slope * s);
        } else {
          store_vector(v + j, found.value);
          store_vector(slope + j, found.slope * s);
        }
      }
    }
    if (job.layers == 3) through_second<kActivated>();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = r * job.ld; j < r * job.ld + job.hidden; j += kLanes)
        store_vector(e + j, load_vector<VF>(e + j) + load_vector<VF>(v + j));
  }

  // v: from the first layer's values to its gradient times `slope`.
  template <Activated (*kActivated)(VF)>
  void through_second() {
    fill(next, job.ld_second, job.second_bias, 0);
    product(next, job.ld_second, v, job.ld, kForth);
    for (int64_t r = 0; r < rows; ++r) {
      const float* head = job.head + entry(r) * job.ld_head;
      float* at = next + r * job.ld_second;
      for (int64_t j = 0; j < job.second; j += kLanes)
        store_vector(at + j, load_vector<VF>(head + j) * kActivated(load_vector<VF>(at + j)).slope);
    }
    clear(v);
    product(v, job.ld, next, job.ld_second, kBack);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = r * job.ld; j < r * job.ld + job.hidden; j += kLanes)
        store_vector(v + j, load_vector<VF>(v + j) * load_vector<VF>(slope + j));
  }

  static float dot(const float* one, const float* other, int64_t n) {
    Block<float> total{};
    for (int64_t j = 0; j < n; j += kChunk) {
      const Block<float> b = load<float>(one + j, n - j), c = load<float>(other + j, n - j);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) total.v[i] += b.v[i] * c.v[i];
    }
    return sum(total);
  }

  // Shortens the change of every row that is beyond `trust` times the length of the row.
  void hold(const float* squares) {
    for (int64_t r = 0; r < count; ++r) {
      float *change = e + r * job.ld, *image = p + r * job.ld;
      const double square = dot(change, image, job.hidden);
      const double limit = job.trust * job.trust * double(squares[r]);
      if (!(square > limit)) continue;
      const float share = float(__builtin_sqrt(limit / square));
      for (int64_t j = 0; j < job.hidden; j += kLanes) {
        store_vector(change + j, load_vector<VF>(change + j) * share);
        store_vector(image + j, load_vector<VF>(image + j) * share);
      }
    }
  }

  template <Activated (*kActivated)(VF)>
  void run() {
    load_rows();
    const bool held = job.trust < __builtin_inf();
    float squares[kGuideBlock];
    for (int64_t r = 0; held && r < count; ++r)
      squares[r] = dot(x + r * job.ld_row, x + r * job.ld_row, job.x.width);
    if (job.layers > 1) {
      fill(a, job.ld, job.bias, job.ld);
      product(a, job.ld, x, job.ld_row, kDown);
    }
    clear(e);
    clear(p);
    double gamma = 1;
    for (int t = 0; t < job.iterations; ++t, gamma *= job.gamma) {
      step<kActivated>(gamma);
      if (held || (job.layers > 1 && t + 1 < job.iterations)) product(p, job.ld, v, job.ld, kGram);
      if (held) hold(squares);
    }
    multiply<true>(e, job.ld, job.matrices[kUp], rows, x, job.ld_row);
    store_rows();
  }
};

template <typename T>
void run_guide(const GuideJob& job, float* scratch, int64_t first, int64_t last) {
  GuideBlock<T> block(job, scratch, first, last);
  switch (job.activation) {
    case GuideActivation::relu:
      return block.template run<relu>();
    case GuideActivation::gelu:
      return block.template run<gelu>();
    case GuideActivation::silu:
      return block.template run<silu>();
  }
}

}  // namespace

namespace DR_ISA {

extern const GuideKernels guide;
const GuideKernels guide = {
    kPanel, kRows, pack, {{run_guide<f16>, run_guide<bf16>, run_guide<float>}}};

}  // namespace DR_ISA
}  // namespace dreamreader
