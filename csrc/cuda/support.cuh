// The sources of a row with a top-k teacher: the slice without the support, and the support's classes.
// A mask in shared memory marks the support's entries in the slice of a block.
#pragma once

#include "sources.cuh"

namespace fused_kd {

// Bytes of the mask of a slice: a byte for each group, in whole vectors.
FUSED_KD_HD int mask_bytes(int slice) { return (slice + 15) / 16 * 16; }
static_assert(GROUP == 8, "the mask has a byte for each group");

// A row's slice without its support, whose entries are absent in every pass, and are not stored.
// Base: GlobalRow or SharedRow of Divergence::tail, which read the student alone.
template <class Base>
struct Outside : Base {
  unsigned char* mask;  // shared memory

  FUSED_KD_DEVICE Outside(const Base& row, unsigned char* mask) : Base(row), mask(mask) {}

  FUSED_KD_DEVICE uint32_t bits(int group) const { return mask[group - this->slice.begin]; }

  template <class Body>
  FUSED_KD_DEVICE auto masked(Body body) const {
    return [this, body](int group, float (&s)[GROUP], float (&t)[GROUP]) {
      const uint32_t support = bits(group);
      if (support != 0) {
#pragma unroll
        for (int e = 0; e < GROUP; ++e)
          if (support >> e & 1) s[e] = t[e] = -INF;
      }
      body(group, s, t);
    };
  }
  template <class Body>
  FUSED_KD_DEVICE void peek(Body body) const {
    Base::peek(masked(body));
  }
  template <class Body>
  FUSED_KD_DEVICE void first(Body body) const {
    Base::first(masked(body));
  }
  template <class Body>
  FUSED_KD_DEVICE void again(Body body) const {
    Base::again(masked(body));
  }
  template <class Body>
  FUSED_KD_DEVICE void for_group(int group, Body body) const {
    Base::for_group(group, masked(body));
  }

  // An entry that is -inf is absent: outside of the support there is no teacher.
  FUSED_KD_DEVICE void true_teacher(int, const float (&)[GROUP], float (&)[GROUP]) const {}

  // In a warp with an entry of the support no lane writes a part of another's group.
  template <Dtype S, bool PLAIN>
  FUSED_KD_DEVICE void store(const RowView& grad, int group, bool together,
                             const float (&g)[GROUP]) const {
    const uint32_t support = bits(group);
    if (together && warp_any(support != 0)) together = false;
    if (support == 0) return store_gradient<S, PLAIN>(grad, group, together, g);
#pragma unroll
    for (int e = 0; e < GROUP; ++e) {
      const int v = group * GROUP + e;
      if (!(support >> e & 1) && v < grad.entries) store_element(grad, v, g[e]);
    }
  }
};

// The tokens of a row's support, of those in the slice of a source (Outside), whose mask they set.
template <class Source>
struct Tokens {
  const Source& source;
  const int32_t* token_ids;
  int K;

  FUSED_KD_DEVICE Tokens(const Params& p, const Row& row, const Source& source)
      : source(source), token_ids(p.token_ids + row.n * p.K), K(p.K) {}

  // Returns the token of class b, -1 if it is not in the slice.
  FUSED_KD_DEVICE int token(int b) const {
    const Slice& slice = source.slice;
    const int v = token_ids[b];
    const bool is_here = v >= slice.begin * GROUP && v < slice.end * GROUP && v < source.p.entries;
    return is_here ? v : -1;
  }

  // Sets the bits of the support, and no others. Called by all threads.
  FUSED_KD_DEVICE void set_mask() const {
    uint32_t* words = reinterpret_cast<uint32_t*>(source.mask);
    for (int i = threadIdx.x; i < mask_bytes(source.p.slice) / 4; i += THREADS) words[i] = 0;
    block_sync();
    for (int b = threadIdx.x; b < K; b += THREADS) {
      const int v = token(b), at = v - source.slice.begin * GROUP;
      if (v >= 0) set_bits(words + at / 32, 1u << at % 32);
    }
    block_sync();
  }
};

// The classes of the support in the slice of a source. If the row's soft term is off the student
// replaces the teacher, which is not read; an entry that is -inf is present all the same.
template <class Source>
struct Support : Tokens<Source> {
  using Tokens<Source>::K;
  RowView teacher;
  bool stands_in;

  FUSED_KD_DEVICE Support(const Params& p, const Row& row, const Source& source)
      : Tokens<Source>(p, row, source),
        teacher(p.teacher, Dtype::f32, row.at, p.K + 1),
        stands_in(!row.soft) {
    // the hard term distinguishes no classes, except which entries are absent; a row that is not
    // valid may list a token twice
    if (stands_in ? !p.options.smoothing : isnan(tail())) K = 0;
  }

  // Returns the teacher's logit of the tail, INF if it is no class.
  FUSED_KD_DEVICE float tail() const {
    return stands_in ? INF : teacher.element(teacher.entries - 1);
  }

  // Calls body(v, s, t) with the token and both logits of this thread's classes.
  template <class Body>
  FUSED_KD_DEVICE void for_each(Body body) const {
    for (int b = threadIdx.x; b < K; b += THREADS) {
      const int v = this->token(b);
      if (v < 0) continue;
      const float s = this->source.element(v);
      body(v, s, stands_in ? fmaxf(s, LOWEST) : teacher.element(b));
    }
  }
};

}  // namespace fused_kd
