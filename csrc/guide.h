// Guidance by a probe, in the space of its first layer (dreamreader/ops/guide.py has the formula).
// With a_0 = W1 h + b1, G = W1 W1' and e_0 = p_0 = 0, an inner step is
//   v = s gamma^t u(a_0 - p),   e += v,   p += G v
// where u is the gradient of sum_k c_k z_k with respect to the first layer's result. After it e and
// p shrink together until e'p, the squared norm of W1'e, is within the trust region. At last
// y = h - W1'e. The width is visited twice, however many steps there are.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "rows.h"

namespace dreamreader {

enum class GuideActivation { relu, gelu, silu };

// A matrix [depth, columns] of any strides, and where it is packed: panels of some columns, zeros
// beyond the last, in each of them one depth after the other.
struct GuideMatrix {
  const float* source;
  int64_t depth, columns, stride_depth, stride_column;
  float* packed;
};

enum GuideMatrices { kDown, kUp, kGram, kForth, kBack, kGuideMatrices };

// Tables of the hidden layers have rows of `ld` floats, zeros beyond the layer's size.
struct GuideJob {
  StridedRows x, out;
  const int64_t* rows;    // the rows that are moved, entry * tokens + token,
  const float* strength;  // and the strength of each
  int64_t count;
  int layers, iterations;
  GuideActivation activation;
  double gamma, trust;
  int64_t hidden, second;           // sizes of the first layer and, of three, the second
  int64_t ld_row, ld, ld_second;    // rows of the block, of its hidden layers
  const float *bias, *second_bias;  // [batch, ld], [ld_second]
  const float* head;  // [batch, ld_head]: c W_last for the last hidden layer; of one layer c itself
  int64_t ld_head;
  // down W1' [width, hidden], up W1, gram G, forth W2' [hidden, second], back W2
  GuideMatrix matrices[kGuideMatrices];
  int64_t block;  // rows that one piece of work holds in its scratch memory
};

constexpr int64_t kGuideBlock = 48;  // rows of a block, at most

struct GuideKernels {
  int64_t panel;  // columns of a packed panel
  int64_t tile;   // rows that are multiplied together; a block is a multiple of it
  void (*pack)(const GuideMatrix& matrix, int64_t first, int64_t last);  // panels
  // Moves the rows first .. last - 1 of the list; f64 is missing.
  ByType<void(const GuideJob& job, float* scratch, int64_t first, int64_t last)> run;
};

DR_KERNELS(GuideKernels, guide)

}  // namespace dreamreader
