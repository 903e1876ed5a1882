// The block kernels as templates; each rows_<isa>.cpp instantiates them once and exports a table.
//
// Per element, the first pass has 2 loads, 1 to 3 exponentials and 1 to 4 sums; the gradient pass
// has the same loads and exponentials, and one store. All arithmetic is float32 after the load;
// sums run in two independent chains of LANES partial sums.
#pragma once

#include <type_traits>

#include "vec.h"

namespace fused_kd {
using namespace FUSED_KD_ISA;  // the formulas below call this instruction set's fma, log2, max
}

#include "kernels.h"

namespace fused_kd {
namespace FUSED_KD_ISA {

template <Load L>
struct Element {
  using type = float;
};
template <>
struct Element<Load::bf16> {
  using type = Bf16;
};
template <>
struct Element<Load::f16> {
  using type = Half;
};

// Calls call(Load) with a load that is known at run time as a constant; Load::f16 only where
// READS_F16.
template <Load L>
using Loaded = std::integral_constant<Load, L>;
template <class Call>
FUSED_KD_INLINE auto with_load(Load load, Call call) {
  if constexpr (READS_F16)
    if (load == Load::f16) return call(Loaded<Load::f16>{});
  if (load == Load::bf16) return call(Loaded<Load::bf16>{});
  if (load == Load::f32_any) return call(Loaded<Load::f32_any>{});
  return call(Loaded<Load::f32>{});
}

// x - m, subtracted before anything else, so that nothing depends on the size of the logits
template <Load L>
FUSED_KD_INLINE Floats relative(Floats x, Floats m) {
  const Floats a = x - m;
  return L == Load::f32_any ? max(a, splat(LOWEST)) : a;
}
template <Load L, int DEGREE = 5>
FUSED_KD_INLINE Floats power(Floats a, Floats k) {
  if constexpr (L == Load::f32_any)
    return exponential_any(a, k);
  else
    return exponential<DEGREE>(a, k);
}

template <Divergence D, Hard H>
constexpr bool needs_P() {
  return Rule<D>::SOFTMAX || H == Hard::power1;
}

template <Load L>
void range(const void* s_, const void* t_, int size, Range* out) {
  using E = typename Element<L>::type;
  const E* s = static_cast<const E*>(s_);
  const E* t = static_cast<const E*>(t_);
  Floats max_s = splat(LOWEST), max_t = max_s, min_s = splat(-LOWEST), min_t = min_s, sum_s{},
         sum_t{};
  for (int i = 0; i < size; i += PAIR) {
    Floats s0, s1, t0, t1;
    load_pair(s + i, s0, s1);
    load_pair(t + i, t0, t1);
    max_s = max(max_s, max(s0, s1));
    max_t = max(max_t, max(t0, t1));
    min_s = min(min_s, min(s0, s1));
    min_t = min(min_t, min(t0, t1));
    sum_s += s0 + s1;
    sum_t += t0 + t1;
  }
  *out = {largest(max_s), -largest(-min_s), sum(sum_s),
          largest(max_t), -largest(-min_t), sum(sum_t)};
}

// Sums are folded every CHUNK entries: in a confident row, one large term and many small ones, a
// long chain of additions to the large one would round each of the small ones.
constexpr int CHUNK = 256;

// total += x by Kahan's summation: x already has the `lost` rounding error of earlier additions
// subtracted.
FUSED_KD_INLINE void add_exactly(Floats x, Floats& total, Floats& lost) {
  const Floats next = total + x;
  lost = (next - total) - x;
  total = next;
}

template <Load L, Divergence D, Hard H>
void sums(const Block& block, BlockSums* out) {
  using E = typename Element<L>::type;
  constexpr bool TEACHER = Rule<D>::READS_TEACHER, SOFTMAX = Rule<D>::SOFTMAX;
  // a divergence without its own sum still needs a sum that shows whether all entries are finite
  constexpr bool CANARY = !Rule<D>::OWN_SUM;
  const E* s = static_cast<const E*>(block.s);
  const E* t = static_cast<const E*>(block.t);
  const Floats m_s = splat(block.m_s), m_t = splat(block.m_t), k = splat(block.k),
               k_1 = splat(block.k_1);
  Floats all_d_s{}, all_d_t{}, all_d_1{}, all_w{};
  Floats squares[2] = {}, lost[2] = {};  // squared differences may all be large and equal
  Floats max_a = splat(LOWEST), min_a = splat(-LOWEST), max_b = max_a, min_b = min_a;
  for (int begin = 0; begin < block.size; begin += CHUNK) {
    const int end = begin + CHUNK < block.size ? begin + CHUNK : block.size;
    Floats d_s{}, d_t{}, d_1{}, w{};
    for (int i = begin; i < end; i += PAIR) {
      Floats sv[2], tv[2];
      load_pair(s + i, sv[0], sv[1]);
      if constexpr (TEACHER) load_pair(t + i, tv[0], tv[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Floats a = relative<L>(sv[j], m_s);
        Floats b{}, P{}, Q{};
        if constexpr (needs_P<D, H>()) {
          P = power<L>(a, k);
          d_s += P;
        }
        if constexpr (TEACHER) b = relative<L>(tv[j], m_t);
        if constexpr (SOFTMAX && TEACHER) {
          Q = power<L>(b, k);
          d_t += Q;
        }
        if constexpr (CANARY)
          w += a + b;
        else if constexpr (SOFTMAX)
          w = Rule<D>::accumulate(a, b, P, Q, w);
        else {
          w = Rule<D>::accumulate(sv[j], tv[j], P, Q, w);
          add_exactly(Rule<D>::accumulate(sv[j], tv[j], P, Q, -lost[j]), squares[j], lost[j]);
        }
        if constexpr (H == Hard::power2) d_1 = fma(P, P, d_1);
        if constexpr (H == Hard::power4) d_1 = fma(P * P, P * P, d_1);
        if constexpr (H == Hard::separate) d_1 += power<L>(a, k_1);
        if constexpr (SOFTMAX || H != Hard::off) {
          max_a = max(max_a, a);
          min_a = min(min_a, a);
        }
        if constexpr (SOFTMAX && TEACHER) {
          max_b = max(max_b, b);
          min_b = min(min_b, b);
        }
      }
    }
    all_d_s += d_s;
    all_d_t += d_t;
    all_d_1 += d_1;
    all_w += w;
  }
  out->d_s = sum(all_d_s);
  out->d_t = sum(all_d_t);
  out->d_1 = H == Hard::power1 ? out->d_s : sum(all_d_1);
  out->canary = sum(all_w);
  out->w = CANARY ? 0.0f : out->canary;
  if constexpr (TEACHER && !SOFTMAX)  // an infinite sum has no compensation
    if (__builtin_isfinite(out->canary)) out->w = sum(squares[0] + squares[1]);
  out->max_a = largest(max_a);
  out->min_a = -largest(-min_a);
  out->max_b = largest(max_b);
  out->min_b = -largest(-min_b);
}

FUSED_KD_INLINE Constants<Floats> broadcast(const Constants<float>& c) {
  return {splat(c.scale), splat(c.ratio), splat(c.offset), splat(c.beta), splat(c.log_ratio)};
}

// Stores log2(p/m), and log2(q/m) unless that is null, of a block's entries for a rule that
// HAS_LOGARITHM. The exponentials, the logarithms and what uses them are three loops: the operations
// of one entry would be a chain of 100 cycles, of which a processor cannot overlap enough.
template <Load L, Divergence D>
FUSED_KD_INLINE void logarithms(const Block& block, const Constants<Floats>& c, float* p_over_m,
                                float* q_over_m) {
  using E = typename Element<L>::type;
  const E* s = static_cast<const E*>(block.s);
  const E* t = static_cast<const E*>(block.t);
  const Floats m_s = splat(block.m_s), m_t = splat(block.m_t), k = splat(block.k);
  for (int i = 0; i < block.size; i += PAIR) {
    Floats sv[2], tv[2], r[2], m[2];
    load_pair(s + i, sv[0], sv[1]);
    load_pair(t + i, tv[0], tv[1]);
    for (int j = 0; j < 2; ++j) {
      r[j] = Rule<D>::log_ratio(relative<L>(sv[j], m_s), relative<L>(tv[j], m_t), k, c);
      m[j] = Rule<D>::mixture(r[j], c);
    }
    store_pair(p_over_m + i, m[0], m[1]);
    if (q_over_m) store_pair(q_over_m + i, r[0], r[1]);
  }
  for (int i = 0; i < block.size; i += PAIR) {
    Floats r[2] = {}, m[2];
    load_pair(p_over_m + i, m[0], m[1]);
    if (q_over_m) load_pair(q_over_m + i, r[0], r[1]);
    const auto first = Rule<D>::logarithms(r[0], m[0]), second = Rule<D>::logarithms(r[1], m[1]);
    store_pair(p_over_m + i, first.p_over_m, second.p_over_m);
    if (q_over_m) store_pair(q_over_m + i, first.q_over_m, second.q_over_m);
  }
}

template <Load L, Divergence D>
void sums2(const Block& block, const Constants<float>& constants, float* x, float* y) {
  using E = typename Element<L>::type;
  const E* s = static_cast<const E*>(block.s);
  const E* t = static_cast<const E*>(block.t);
  const Floats m_s = splat(block.m_s), m_t = splat(block.m_t), k = splat(block.k);
  const Constants<Floats> c = broadcast(constants);
  constexpr bool LOGARITHM = Rule<D>::HAS_LOGARITHM;
  alignas(64) float p_over_m[LOGARITHM ? BLOCK : 1], q_over_m[LOGARITHM ? BLOCK : 1];
  if constexpr (LOGARITHM) logarithms<L, D>(block, c, p_over_m, q_over_m);
  Floats all_x{}, all_y{};
  for (int begin = 0; begin < block.size; begin += CHUNK) {
    const int end = begin + CHUNK < block.size ? begin + CHUNK : block.size;
    Floats x_sum{}, y_sum{};
    for (int i = begin; i < end; i += PAIR) {
      Floats sv[2], tv[2], p_log[2], q_log[2];
      load_pair(s + i, sv[0], sv[1]);
      load_pair(t + i, tv[0], tv[1]);
      if constexpr (LOGARITHM) {
        load_pair(p_over_m + i, p_log[0], p_log[1]);
        load_pair(q_over_m + i, q_log[0], q_log[1]);
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Floats a = relative<L>(sv[j], m_s), b = relative<L>(tv[j], m_t);
        const Floats P = power<L>(a, k), Q = power<L>(b, k);
        if constexpr (LOGARITHM)
          Rule<D>::accumulate2({p_log[j], q_log[j]}, P, Q, x_sum, y_sum);
        else
          Rule<D>::accumulate2(a, b, P, Q, k, c, x_sum, y_sum);
      }
    }
    all_x += x_sum;
    all_y += y_sum;
  }
  *x = sum(all_x);
  *y = sum(all_y);
}

// e^(s - m_s), from P = e^((s - m_s)/T) if T is 1, 2 or 4
template <Load L, Hard H, int DEGREE>
FUSED_KD_INLINE Floats hard_power(Floats a, Floats k_1, Floats P) {
  if constexpr (H == Hard::power1) return P;
  if constexpr (H == Hard::power2) return P * P;
  if constexpr (H == Hard::power4) return (P * P) * (P * P);
  return power<L, DEGREE>(a, k_1);
}

template <Load L, Divergence D, Hard H>
void gradient(const Block& block, const Constants<float>& constants, float hard_scale,
              float hard_offset, void* grad) {
  using E = typename Element<L>::type;
  constexpr bool TEACHER = Rule<D>::READS_TEACHER, LOGARITHM = Rule<D>::HAS_LOGARITHM;
  constexpr int DEGREE =
      L == Load::bf16 ? 4 : 5;  // 1/700 of the half unit that rounding to bfloat16 loses
  const E* s = static_cast<const E*>(block.s);
  const E* t = static_cast<const E*>(block.t);
  E* g = static_cast<E*>(grad);
  const Floats m_s = splat(block.m_s), m_t = splat(block.m_t), k = splat(block.k),
               k_1 = splat(block.k_1);
  const E* next_s = static_cast<const E*>(block.next_s ? block.next_s : block.s);
  const E* next_t = static_cast<const E*>(block.next_t ? block.next_t : block.t);
  const Floats scale = splat(hard_scale), offset = splat(hard_offset);
  const Constants<Floats> c = broadcast(constants);
  alignas(64) float p_over_m[LOGARITHM ? BLOCK : 1];
  if constexpr (LOGARITHM) logarithms<L, D>(block, c, p_over_m, nullptr);
  for (int i = 0; i < block.size; i += PAIR) {
    Floats sv[2], tv[2], p_log[2], gv[2];
    load_pair(s + i, sv[0], sv[1]);
    if constexpr (LOGARITHM)
      load_pair(p_over_m + i, p_log[0], p_log[1]);
    else if constexpr (TEACHER)
      load_pair(t + i, tv[0], tv[1]);
    __builtin_prefetch(next_s + i, 0, 2);
    __builtin_prefetch(next_t + i, 0, 2);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Floats a = relative<L>(sv[j], m_s);
      Floats b{}, P{}, Q{};
      if constexpr (needs_P<D, H>()) P = power<L, DEGREE>(a, k);
      if constexpr (LOGARITHM) {
        gv[j] = Rule<D>::gradient(p_log[j], P, c, offset);
      } else if constexpr (Rule<D>::SOFTMAX) {
        if constexpr (TEACHER) {
          b = relative<L>(tv[j], m_t);
          Q = power<L, DEGREE>(b, k);
        }
        gv[j] = Rule<D>::gradient(a, b, P, Q, k, c, offset);
      } else if constexpr (TEACHER) {
        gv[j] = Rule<D>::gradient(sv[j], tv[j], P, Q, k, c, offset);
      } else {
        gv[j] = offset;
      }
      if constexpr (H != Hard::off) gv[j] = fma(scale, hard_power<L, H, DEGREE>(a, k_1, P), gv[j]);
    }
    store_pair(g + i, gv[0], gv[1]);
  }
}

// The same for ten sums, whose folding costs more; the label, often the largest term, is not in them.
constexpr int LONG_CHUNK = 512;

template <Load L, Hard H>
void measure(const Block& block, float ratio_, BlockMeasures* out) {
  using E = typename Element<L>::type;
  constexpr bool AT_1 = H == Hard::power1;
  const E* s = static_cast<const E*>(block.s);
  const E* t = static_cast<const E*>(block.t);
  const Floats m_s = splat(block.m_s), m_t = splat(block.m_t), k = splat(block.k),
               k_1 = splat(block.k_1), minus_ratio = splat(-ratio_);
  Floats max_s = splat(LOWEST), max_t = max_s;
  enum { SUM_E, EE, D, DD, ED, G, PA, EA, QB, GB, COUNT };
  Floats all[COUNT] = {};
  for (int begin = 0; begin < block.size; begin += LONG_CHUNK) {
    const int end = begin + LONG_CHUNK < block.size ? begin + LONG_CHUNK : block.size;
    Floats sums[COUNT] = {};
    for (int i = begin; i < end; i += PAIR) {
      Floats sv[2], tv[2];
      load_pair(s + i, sv[0], sv[1]);
      load_pair(t + i, tv[0], tv[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        max_s = max(max_s, sv[j]);
        max_t = max(max_t, tv[j]);
        const Floats a = relative<L>(sv[j], m_s), b = relative<L>(tv[j], m_t);
        const Floats P = power<L>(a, k), Q = power<L>(b, k);
        const Floats e = hard_power<L, H, 5>(a, k_1, P), d = fma(minus_ratio, Q, P);
        sums[SUM_E] += e;
        sums[EE] = fma(e, e, sums[EE]);
        sums[D] += d;
        sums[DD] = fma(d, d, sums[DD]);
        sums[ED] = fma(e, d, sums[ED]);
        sums[PA] = fma(P, a, sums[PA]);
        sums[QB] = fma(Q, b, sums[QB]);
        if constexpr (!AT_1) {
          const Floats g = hard_power<L, H, 5>(b, k_1, Q);
          sums[G] += g;
          sums[EA] = fma(e, a, sums[EA]);
          sums[GB] = fma(g, b, sums[GB]);
        }
      }
    }
#pragma GCC unroll 10
    for (int i = 0; i < COUNT; ++i) all[i] += sums[i];
  }
  *out = {sum(all[SUM_E]), sum(all[EE]), sum(all[D]),    sum(all[DD]),
          sum(all[ED]),    sum(all[G]),  sum(all[PA]),   sum(all[EA]),
          sum(all[QB]),    sum(all[GB]), largest(max_s), largest(max_t)};
}

template <Load L>
float largest_of(const void* s_, int size) {
  using E = typename Element<L>::type;
  const E* s = static_cast<const E*>(s_);
  Floats most = splat(LOWEST);
  for (int i = 0; i < size; i += PAIR) {
    Floats a, b;
    load_pair(s + i, a, b);
    most = max(most, max(a, b));
  }
  return largest(most);
}

// Map run-time values to a template instance. Only combinations that the driver uses exist.
template <Load L, Divergence D, class Call>
FUSED_KD_INLINE void choose_hard(Hard h, Call& call) {
  if constexpr (D == Divergence::none) {
    call.template run<L, D, Hard::power1>();
  } else if constexpr (!Rule<D>::SOFTMAX) {
    h == Hard::off ? call.template run<L, D, Hard::off>()
                   : call.template run<L, D, Hard::separate>();
  } else {
    switch (h) {
      case Hard::off: return call.template run<L, D, Hard::off>();
      case Hard::power1: return call.template run<L, D, Hard::power1>();
      case Hard::power2: return call.template run<L, D, Hard::power2>();
      case Hard::power4: return call.template run<L, D, Hard::power4>();
      case Hard::separate: return call.template run<L, D, Hard::separate>();
    }
  }
}
template <Load L, class Call>
FUSED_KD_INLINE void choose_divergence(Divergence d, Hard h, Call& call) {
  with_rule(d, [&](auto rule) { choose_hard<L, rule.DIVERGENCE>(h, call); });
}
template <class Call>
FUSED_KD_INLINE void choose(Load l, Divergence d, Hard h, Call& call) {
  with_load(l, [&](auto load) { choose_divergence<load.value>(d, h, call); });
}

struct SumsCall {
  const Block& block;
  BlockSums* out;
  template <Load L, Divergence D, Hard H>
  void run() {
    sums<L, D, H>(block, out);
  }
};
struct Sums2Call {
  const Block& block;
  const Constants<float>& c;
  float *x, *y;
  template <Load L, Divergence D, Hard H>
  void run() {
    if constexpr (Rule<D>::TWO_PASSES) sums2<L, D>(block, c, x, y);
  }
};
struct GradientCall {
  const Block& block;
  const Constants<float>& c;
  float hard_scale, hard_offset;
  void* grad;
  template <Load L, Divergence D, Hard H>
  void run() {
    gradient<L, D, H>(block, c, hard_scale, hard_offset, grad);
  }
};

inline void range_entry(Load l, const void* s, const void* t, int size, Range* out) {
  with_load(l, [&](auto load) { range<load.value>(s, t, size, out); });
}
inline void sums_entry(Load l, Divergence d, Hard h, const Block& block, BlockSums* out) {
  SumsCall call{block, out};
  choose(l, d, h, call);
}
inline void sums2_entry(Load l, Divergence d, const Block& block, const Constants<float>& c,
                        float* x, float* y) {
  Sums2Call call{block, c, x, y};
  choose(l, d, Hard::off, call);
}
inline void gradient_entry(Load l, Divergence d, Hard h, const Block& block,
                           const Constants<float>& c, float hard_scale, float hard_offset,
                           void* grad) {
  GradientCall call{block, c, hard_scale, hard_offset, grad};
  choose(l, d, h, call);
}

template <Load L>
FUSED_KD_INLINE void measure_by(Hard h, const Block& block, float ratio, BlockMeasures* out) {
  switch (h) {
    case Hard::power1: return measure<L, Hard::power1>(block, ratio, out);
    case Hard::power2: return measure<L, Hard::power2>(block, ratio, out);
    case Hard::power4: return measure<L, Hard::power4>(block, ratio, out);
    default: return measure<L, Hard::separate>(block, ratio, out);
  }
}
inline void measure_entry(Load l, Hard h, const Block& block, float ratio, BlockMeasures* out) {
  with_load(l, [&](auto load) { measure_by<load.value>(h, block, ratio, out); });
}
inline float largest_entry(Load l, const void* s, int size) {
  return with_load(l, [&](auto load) { return largest_of<load.value>(s, size); });
}

inline float differences(const float* s, int size, float m) {
  Floats total{};
  const Floats reference = splat(m);
  int i = 0;
  for (; i + PAIR <= size; i += PAIR) {
    Floats a, b;
    load_pair(s + i, a, b);
    total += (a - reference) + (b - reference);
  }
  float result = sum(total);
  for (; i < size; ++i) result += s[i] - m;
  return result;
}

inline void widen(Dtype dtype, const void* from, float* to, int size) {
  if (dtype == Dtype::f32) {
    memcpy(to, from, size * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const Bf16* p = static_cast<const Bf16*>(from);
    for (int i = 0; i < size; ++i) {
      const uint32_t word = uint32_t(p[i].raw) << 16;
      memcpy(to + i, &word, sizeof word);
    }
  } else {
    const Half* p = static_cast<const Half*>(from);
    int i = 0;
#if defined(__F16C__)
    for (; i + PAIR <= size; i += PAIR) {
      Floats first, second;
      load_pair(p + i, first, second);
      store_pair(to + i, first, second);
    }
#endif
    for (; i < size; ++i) to[i] = half_to_float(p[i]);
  }
}

inline void narrow(Dtype dtype, const float* from, void* to, int size) {
  if (dtype == Dtype::f32) {
    memcpy(to, from, size * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    Bf16* p = static_cast<Bf16*>(to);
    for (int i = 0; i < size; ++i) {
      uint32_t word;
      memcpy(&word, from + i, sizeof word);
      p[i].raw = uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
  } else {
    Half* p = static_cast<Half*>(to);
    int i = 0;
#if defined(__F16C__)
    for (; i + PAIR <= size; i += PAIR) {
      Floats first, second;
      load_pair(from + i, first, second);
      store_pair(p + i, first, second);
    }
#endif
    for (; i < size; ++i) p[i] = float_to_half(from[i]);
  }
}

// Multiplies a gradient by a factor: exactly for a power of two, else in float32 with one more
// rounding. Zeros stay zeros for any factor, so that an ignored row is not NaN.
inline void scale(Dtype dtype, void* values, int64_t size, float factor) {
  float buffer[BLOCK];
  for (int64_t i = 0; i < size; i += BLOCK) {
    const int count = int(size - i < BLOCK ? size - i : BLOCK);
    char* p = static_cast<char*>(values) + i * width(dtype);
    float* work = dtype == Dtype::f32 ? reinterpret_cast<float*>(p) : buffer;
    if (dtype != Dtype::f32) widen(dtype, p, work, count);
    for (int j = 0; j < count; ++j) work[j] = work[j] != 0 ? work[j] * factor : work[j];
    if (dtype != Dtype::f32) narrow(dtype, work, p, count);
  }
}

}  // namespace FUSED_KD_ISA
}  // namespace fused_kd

#define FUSED_KD_DEFINE_TABLE(table, label)                                                      \
  namespace fused_kd {                                                                           \
  extern const Kernels table;                                                                    \
  const Kernels table = {label,       EXPONENT_RANGE, READS_F16,     range_entry,   sums_entry,  \
                         sums2_entry, gradient_entry, measure_entry, largest_entry, differences, \
                         widen,       narrow,         scale};                                    \
  }
