// Choice of tokens: which places of a batch are kept in one call, and the keys of their rows.
//
//   entry e keeps its candidates tokens[offsets[e] + permuted(j, n_e, streams[e])], j < counts[e],
//   in ascending order; without counts all of them. Row: place (entries[e], token) and key
//   (samples[e], moment, branches[e], token + shift[e]).
#pragma once

#include <cstdint>

namespace dreamreader {

struct ChooseJob {
  const int32_t* tokens;   // candidates of all entries, one entry after the other, each ascending
  const int32_t* offsets;  // [entries + 1] into tokens
  int64_t entries;
  const int32_t *entry, *samples, *branches;  // [entries]
  const int64_t* streams;                     // [entries]: seeds
  const int32_t* counts;                      // [entries] or null
  const int32_t* shift;                       // [entries] or null
  int32_t moment;
};

// How many rows the job gives.
int64_t chosen_rows(const ChooseJob& job);

// Writes places [rows, 2] and keys [rows, 4]. Its marks, a bit for each candidate of an entry, are
// kept by the thread between calls.
void choose(const ChooseJob& job, int32_t* places, int32_t* keys);

// counts[i] = rows that image i keeps in call number `call` of `calls`, of `budget` in all: an
// equal share, and one of those left over in calls that the image's permutation picks.
void counts_of_budget(int64_t budget, int64_t calls, int64_t call, const int64_t* streams,
                      int64_t images, int32_t* counts);

}  // namespace dreamreader
