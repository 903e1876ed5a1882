// The sources of the groups of a row's slice: global memory, which each pass reads again, or the
// shared memory of a cluster of blocks that holds both rows, so that global memory is read once.
//
// Both have these members; the groups are those of the calling thread:
//     first(body), again(body)   call body(group, s, t) for each group
//     peek(body)                 the same for the first group, if there is one
//     for_group(group, body)     the same for one group
//     indices(body)              call body(group) for each group, without reading it
//     store<S, PLAIN>            stores a group of the gradient, as store_gradient does
//     element(v)                 returns the student's logit v of the slice, after the first pass
//     STAYS                      whether groups can be read again after others were overwritten
#pragma once

#include "sizes.h"
#include "passes.cuh"

namespace fused_kd {

// Groups [begin, end) of a row.
struct Slice {
  int begin, end;

  FUSED_KD_DEVICE Slice(const Params& p, int part) {
    const int groups = (p.entries + GROUP - 1) / GROUP;
    begin = part * p.slice;
    end = begin + p.slice < groups ? begin + p.slice : groups;
  }

  // Returns whether all lanes of the warp have a group in the step in which this thread has
  // `group`.
  FUSED_KD_DEVICE bool together(int group) const { return begin + ((group - begin) | 31) < end; }
};

// Both sides of a row. If the row's soft term is off, the student replaces the teacher: the soft
// gradient is then 0 times a finite number, and the teacher is read only to find absent entries
// (`true_teacher`).
template <Divergence D, Dtype S, bool SAME>
struct Pair {
  static constexpr bool READS_TEACHER = Rule<D>::READS_TEACHER;
  const Params& p;
  RowIndex at;
  Slice slice;
  RowView student, teacher;
  bool stands_in;

  FUSED_KD_DEVICE Pair(const Params& p, const Row& row, int part)
      : p(p),
        at(row.at),
        slice(p, part),
        student(p.student, S, at, p.entries),
        teacher(student),
        stands_in(true) {
    if (!READS_TEACHER || !row.soft) return;
    teacher = RowView(p.teacher, SAME ? S : p.teacher.dtype, at, p.entries);
    stands_in = false;
  }

  // Returns whether this thread processes the group.
  FUSED_KD_DEVICE bool is_mine(int group) const {
    return group >= first_group() && group < slice.end && (group - first_group()) % THREADS == 0;
  }
  FUSED_KD_DEVICE int first_group() const { return slice.begin + static_cast<int>(threadIdx.x); }
  FUSED_KD_DEVICE bool has_group() const { return first_group() < slice.end; }

  template <class Body>
  FUSED_KD_DEVICE void indices(Body body) const {
    for (int g = first_group(); g < slice.end; g += THREADS) body(g);
  }

  template <class Body>
  FUSED_KD_DEVICE void widen_group(int group, const Raw& raw_s, const Raw& raw_t, Body body) const {
    float s[GROUP], t[GROUP];
    widen<S>(raw_s, s);
    if (READS_TEACHER)
      widen_teacher<S, SAME>(raw_t, teacher.dtype, t);
    else
      widen<S>(raw_s, t);
    body(group, s, t);
  }

  template <Dtype TYPE, bool PLAIN>
  FUSED_KD_DEVICE void store(const RowView& grad, int group, bool together,
                             const float (&g)[GROUP]) const {
    store_gradient<TYPE, PLAIN>(grad, group, together, g);
  }

  // Corrects t for label smoothing, which counts the entries that are absent on both sides. If the
  // student replaces the teacher, t becomes -inf at absent entries and 0 if the student alone is
  // -inf.
  FUSED_KD_DEVICE void true_teacher(int group, const float (&s)[GROUP], float (&t)[GROUP]) const {
    if (!stands_in || !p.options.smoothing) return;
    const RowView truth(p.teacher, p.teacher.dtype, at, p.entries);
    widen_teacher<S, false>(load_group(truth, group), truth.dtype, t);
#pragma unroll
    for (int e = 0; e < GROUP; ++e) t[e] = s[e] == -INF && t[e] != -INF ? 0.0f : s[e];
  }
};

template <Divergence D, Dtype S, bool SAME>
struct GlobalRow : Pair<D, S, SAME> {
  static constexpr bool STAYS = false;
  using Base = Pair<D, S, SAME>;
  using Base::slice;

  FUSED_KD_DEVICE GlobalRow(const Params& p, const Row& row, int part) : Base(p, row, part) {}

  FUSED_KD_DEVICE float element(int v) const { return this->student.element(v); }

  struct Loaded {
    Raw student, teacher;
  };
  FUSED_KD_DEVICE Loaded load(int group) const {
    Loaded raw = {load_group(this->student, group), {}};
    if (Base::READS_TEACHER) raw.teacher = load_group(this->teacher, group);
    return raw;
  }

  // Calls body for groups `group`, `group + step`, ... inside the slice. `count` is the same for
  // all lanes of a warp, which stay together because neighbours exchange what they store. In 16
  // bits a group is loaded before its predecessor is used, so that 64 bytes per thread are in
  // flight, as with one group in float32.
  template <class Body>
  FUSED_KD_DEVICE void for_groups(int group, int step, int count, Body body) const {
    constexpr bool AHEAD = S != Dtype::f32;
    if (count <= 0) return;
    Loaded next = {};
    if (AHEAD && group < slice.end) next = load(group);
    for (; count > 0; --count, group += step) {
      Loaded raw = next;
      if (AHEAD && count > 1 && group + step < slice.end) next = load(group + step);
      if (group >= slice.end) continue;
      if (!AHEAD) raw = load(group);
      this->widen_group(group, raw.student, raw.teacher, body);
    }
  }

  // Returns the number of groups of the first lane of this warp; no other lane has more.
  FUSED_KD_DEVICE int count() const {
    const int lane = threadIdx.x % 32, left = slice.end - (this->first_group() - lane);
    return left > 0 ? (left - 1) / THREADS + 1 : 0;
  }

  template <class Body>
  FUSED_KD_DEVICE void peek(Body body) const {
    if (this->has_group()) for_group(this->first_group(), body);
  }

  template <class Body>
  FUSED_KD_DEVICE void first(Body body) const {
    for_groups(this->first_group(), THREADS, count(), body);
  }

  template <class Body>
  FUSED_KD_DEVICE void for_group(int group, Body body) const {
    for_groups(group, 0, 1, body);
  }

  // Backwards, since the groups that were read last are still in a cache.
  template <class Body>
  FUSED_KD_DEVICE void again(Body body) const {
    for_groups(this->first_group() + (count() - 1) * THREADS, -THREADS, count(), body);
  }
};

// ------------------------------------------------------------------------------- shared memory

#ifdef FUSED_KD_HAS_CLUSTERS

template <Divergence D, Dtype S, bool SAME>
struct SharedRow : Pair<D, S, SAME> {
  static constexpr bool STAYS = true;
  using Base = Pair<D, S, SAME>;
  using Base::slice;
  unsigned char *shared_s, *shared_t;  // shared memory
  uint64_t* barriers;                  // (MAX_CHUNKS)
  bool bulk;

  FUSED_KD_DEVICE SharedRow(const Params& p, const Row& row, int part, unsigned char* memory,
                            uint64_t* barriers)
      : Base(p, row, part), shared_s(memory), barriers(barriers) {
    // without a separate teacher there is no second slice, and the student's memory is used
    shared_t =
        this->stands_in ? shared_s : shared_s + static_cast<int64_t>(p.slice) * GROUP * width(S);
    bulk = this->student.is_plain() && this->teacher.is_plain();
  }

  FUSED_KD_DEVICE bool copies_teacher() const { return Base::READS_TEACHER && !this->stands_in; }

  // One thread issues all bulk copies; the others wait for each chunk before they read it. Rows
  // that are not aligned for bulk copies are loaded by all threads, which then synchronise; their
  // barriers expect no bytes.
  FUSED_KD_DEVICE void load() const {
    if (threadIdx.x == 0) issue_copies();
    if (bulk) return;
    this->indices([&](int g) {
      put(shared_s, S, g, load_group(this->student, g));
      if (copies_teacher()) put(shared_t, this->teacher.dtype, g, load_group(this->teacher, g));
    });
  }

  FUSED_KD_DEVICE void issue_copies() const {
    for (int c = 0; slice.begin + c * CHUNK < slice.end; ++c) barrier_init(&barriers[c]);
    barrier_init_fence();
    for (int c = 0; slice.begin + c * CHUNK < slice.end; ++c) {
      const int begin = slice.begin + c * CHUNK;
      const int left = bulk ? slice.end - begin : 0, groups = left < CHUNK ? left : CHUNK;
      const int bytes_s = groups * GROUP * width(S);
      const int bytes_t = copies_teacher() ? groups * GROUP * width(this->teacher.dtype) : 0;
      barrier_expect(&barriers[c], bytes_s + bytes_t);
      if (bytes_s > 0) copy(shared_s, this->student, begin, bytes_s, c);
      if (bytes_t > 0) copy(shared_t, this->teacher, begin, bytes_t, c);
    }
  }

  FUSED_KD_DEVICE void copy(unsigned char* shared, const RowView& row, int group, int bytes,
                            int chunk) const {
    const int size = GROUP * width(row.dtype);
    bulk_copy(shared + static_cast<int64_t>(group - slice.begin) * size,
              row.data + static_cast<int64_t>(group) * size, bytes, &barriers[chunk]);
  }

  FUSED_KD_DEVICE void put(unsigned char* shared, Dtype dtype, int group, const Raw& raw) const {
    Bits16* to = reinterpret_cast<Bits16*>(shared + (group - slice.begin) * GROUP * width(dtype));
    to[0] = raw.low;
    if (dtype == Dtype::f32) to[1] = raw.high;
  }

  FUSED_KD_DEVICE Raw get(const unsigned char* shared, Dtype dtype, int group) const {
    const unsigned char* from = shared + (group - slice.begin) * GROUP * width(dtype);
    Raw raw = {load16(from), {}};
    if (dtype == Dtype::f32) raw.high = load16(from + 16);
    return raw;
  }

  FUSED_KD_DEVICE float element(int v) const {
    const int first = slice.begin * GROUP;
    barrier_wait(&barriers[(v - first) / (CHUNK * GROUP)], 0);
    return element_of(shared_s, S, v - first);
  }

  template <class Body>
  FUSED_KD_DEVICE void for_group(int group, Body body) const {
    Raw raw_t = {};
    if (Base::READS_TEACHER) raw_t = get(shared_t, this->teacher.dtype, group);
    this->widen_group(group, get(shared_s, S, group), raw_t, body);
  }

  template <class Body>
  FUSED_KD_DEVICE void peek(Body body) const {
    if (slice.begin < slice.end) barrier_wait(&barriers[0], 0);
    if (this->has_group()) for_group(this->first_group(), body);
  }

  template <class Body>
  FUSED_KD_DEVICE void first(Body body) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < slice.end - slice.begin; i += THREADS) {
      // before a thread's first group of a chunk
      if (i / THREADS % CHUNK_GROUPS == 0) barrier_wait(&barriers[i / CHUNK], 0);
      for_group(slice.begin + i, body);
    }
  }

  template <class Body>
  FUSED_KD_DEVICE void again(Body body) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < slice.end - slice.begin; i += THREADS)
      for_group(slice.begin + i, body);
  }
};

#endif

}  // namespace fused_kd
