#include "choose.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "op.h"
#include "permutation.h"

namespace dreamreader {
namespace {

int64_t candidates(const ChooseJob& job, int64_t e) { return job.offsets[e + 1] - job.offsets[e]; }

int64_t kept(const ChooseJob& job, int64_t e) {
  const int64_t all = candidates(job, e);
  return job.counts ? std::min<int64_t>(job.counts[e], all) : all;
}

// Bit i of marks: candidate i is kept. Of more than half, those that are not are drawn.
void mark(std::vector<uint64_t>& marks, int64_t all, int64_t keep, uint64_t stream) {
  const bool few = keep <= all / 2;
  marks.assign(size_t(all + 63) / 64, few ? 0 : ~uint64_t{0});
  if (!few && all % 64) marks.back() = (uint64_t{1} << all % 64) - 1;
  if (keep == all) return;
  const Permutation permutation(all, stream);
  for (int64_t j = few ? 0 : keep, end = few ? keep : all; j < end; ++j) {
    const int64_t i = permutation(j);
    marks[size_t(i / 64)] ^= uint64_t{1} << i % 64;
  }
}

}  // namespace

int64_t chosen_rows(const ChooseJob& job) {
  int64_t rows = 0;
  for (int64_t e = 0; e < job.entries; ++e) rows += kept(job, e);
  return rows;
}

void choose(const ChooseJob& job, int32_t* places, int32_t* keys) {
  thread_local std::vector<uint64_t> marks;
  for (int64_t e = 0; e < job.entries; ++e) {
    const int32_t* tokens = job.tokens + job.offsets[e];
    const int32_t shift = job.shift ? job.shift[e] : 0;
    mark(marks, candidates(job, e), kept(job, e), uint64_t(job.streams[e]));
    for (size_t word = 0; word < marks.size(); ++word) {
      for (uint64_t bits = marks[word]; bits; bits &= bits - 1) {
        const int32_t token = tokens[word * 64 + size_t(std::countr_zero(bits))];
        *places++ = job.entry[e];
        *places++ = token;
        *keys++ = job.samples[e];
        *keys++ = job.moment;
        *keys++ = job.branches[e];
        *keys++ = token + shift;
      }
    }
  }
}

void counts_of_budget(int64_t budget, int64_t calls, int64_t call, const int64_t* streams,
                      int64_t images, int32_t* counts) {
  const int64_t share = budget / calls, left = budget % calls;
  for (int64_t i = 0; i < images; ++i)
    counts[i] = int32_t(share + (left && permuted(call, calls, uint64_t(streams[i])) < left));
}

namespace {

// The elements of a dense integer tensor in CPU memory.
template <typename T>
T* integers(py::handle tensor, int dims, int64_t size, const char* message) {
  const TensorView view(tensor);
  int64_t stride = 1, elements = 1;
  bool fits = view.dims() == dims && view.is(kDLInt, sizeof(T) * 8) &&
              view.device().type == kDLCPU && (size < 0 || view.size(0) == size);
  for (int i = dims - 1; i >= 0 && fits; --i) {
    fits = view.size(i) <= 1 || view.stride(i) == stride || elements == 0;
    stride *= view.size(i);
    elements *= view.size(i);
  }
  require(fits, message);
  return reinterpret_cast<T*>(view.data());
}

// Checks what memory safety needs: that offsets and counts stay inside.
ChooseJob job_of(py::handle tokens, py::handle offsets, py::handle entry, py::handle samples,
                 py::handle branches, py::handle streams, py::handle counts, py::handle shift,
                 int32_t moment) {
  ChooseJob job{};
  job.entries = TensorView(entry).size(0);
  constexpr auto wrong = "choose: entries and what goes with them must be int32 [entries]";
  job.tokens = integers<int32_t>(tokens, 1, -1, "choose: tokens must be int32");
  job.offsets =
      integers<int32_t>(offsets, 1, job.entries + 1, "choose: offsets must be int32 [entries + 1]");
  job.entry = integers<int32_t>(entry, 1, job.entries, wrong);
  job.samples = integers<int32_t>(samples, 1, job.entries, wrong);
  job.branches = integers<int32_t>(branches, 1, job.entries, wrong);
  job.streams =
      integers<int64_t>(streams, 1, job.entries, "choose: streams must be int64 [entries]");
  if (!counts.is_none()) job.counts = integers<int32_t>(counts, 1, job.entries, wrong);
  if (!shift.is_none()) job.shift = integers<int32_t>(shift, 1, job.entries, wrong);
  job.moment = moment;
  require(job.offsets[0] >= 0 && job.offsets[job.entries] <= TensorView(tokens).size(0),
          "choose: offsets reach beyond tokens");
  for (int64_t e = 0; e < job.entries; ++e)
    require(job.offsets[e] <= job.offsets[e + 1] && (!job.counts || job.counts[e] >= 0),
            "choose: offsets must ascend and counts be 0 or more");
  return job;
}

// Fills the first rows of places and keys and returns how many; -1 and nothing written where they
// have fewer.
int64_t choose_cpu(py::handle tokens, py::handle offsets, py::handle entry, py::handle samples,
                   py::handle branches, py::handle streams, py::handle counts, py::handle shift,
                   int32_t moment, py::handle places, py::handle keys) {
  const ChooseJob job =
      job_of(tokens, offsets, entry, samples, branches, streams, counts, shift, moment);
  const TensorView to(places), names(keys);
  int32_t* at = integers<int32_t>(places, 2, -1, "choose: places must be int32 [rows, 2]");
  int32_t* named = integers<int32_t>(keys, 2, to.size(0), "choose: keys must be int32 [rows, 4]");
  require(to.size(1) == 2 && names.size(1) == 4, "choose: places have 2 columns, keys 4");
  const int64_t rows = chosen_rows(job);
  if (rows > to.size(0)) return -1;
  py::gil_scoped_release release;
  choose(job, at, named);
  return rows;
}

void counts_of_budget_cpu(int64_t budget, int64_t calls, int64_t call, py::handle streams,
                          py::handle counts) {
  const int64_t images = TensorView(streams).size(0);
  require(calls >= 1 && call >= 0 && call < calls, "counts_of_budget: call must be below calls");
  counts_of_budget(budget, calls, call,
                   integers<int64_t>(streams, 1, images, "counts_of_budget: streams: int64"),
                   images, integers<int32_t>(counts, 1, images, "counts_of_budget: counts: int32"));
}

Bind bind_choose([](py::module_& m) {
  m.def("choose_cpu", &choose_cpu);
  m.def("counts_of_budget_cpu", &counts_of_budget_cpu);
});

}  // namespace
}  // namespace dreamreader
