// A selection from a matrix that is shown in blocks of columns, in ascending order, perhaps more
// than once: a tensor that exists, or products that exist block by block.
#pragma once

#include <cstdint>
#include <memory>

#include "dtype.h"

namespace dreamreader {

// `columns` entries of every row, rows `stride` entries apart; `first` is the first column.
struct SelectBlock {
  const void* x;
  int64_t stride, columns;
  int32_t first;
  const uint8_t* pool;  // a bit for each of its columns that takes part, or null: all do
};

// Where results go: entries in the first slots, then columns of -1 and values of 0.
struct SelectOut {
  int64_t* row_ptr;  // [rows + 1]
  int32_t* columns;  // [slots]
  void* values;      // [slots]
  int64_t slots;
  void* threshold;  // the smallest value, or null
};

class Selector {
 public:
  virtual ~Selector() = default;
  // Looks at some rows of the matrix, `share` of all, before begin(): a result does not depend on
  // them, its speed does.
  virtual void sample(const SelectBlock&, int64_t /*rows*/, double /*share*/, int /*threads*/) {}
  virtual void begin(int /*threads*/) {}  // before the first block
  virtual void add(int64_t block, const SelectBlock& entries, int threads) = 0;
  // After the last block: where false, begin() and all blocks must come again.
  virtual bool done(int /*threads*/) { return true; }
  virtual void emit(const SelectOut& out, int threads) = 0;
};

// The `count` largest of all entries; the k largest of each row; those above a threshold, one for
// all columns or one for each (thresholds are read while blocks are added).
std::unique_ptr<Selector> select_batch(DType type, int64_t rows, int64_t blocks, int64_t count);
std::unique_ptr<Selector> select_rows(DType type, int64_t rows, int64_t k);
std::unique_ptr<Selector> select_above(DType type, int64_t rows, int64_t blocks, int64_t slots,
                                       const float* thresholds, bool each);

}  // namespace dreamreader
