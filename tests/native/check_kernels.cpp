// Every block kernel of every table that is linked in, against double arithmetic and, if the
// instruction sets must agree to the bit, against each other.
//
// Tables: -DTABLES="&kernels_generic,&kernels_avx2". Exit status 1 and a line per failure if a
// check fails. Buffers have their exact size, off any alignment: a sanitizer reports every access
// outside.
#include <random>

#include "check.h"

namespace fused_kd {
extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_avx512_bf16;
}
using namespace fused_kd;

static const Kernels* const tables[] = {TABLES};

// Divergences, none, and the tail of a top-k teacher: everything that the kernels have a rule for.
static constexpr int RULES = int(Divergence::tail) + 1;
static bool reads_teacher(Divergence d) {
  return with_rule(d, [](auto rule) { return rule.READS_TEACHER; });
}

struct Case {
  Load load;
  Divergence divergence;
  Hard hard;
  int size;
  std::vector<float> s, t;
  Block block;
  bool bf16() const { return load == Load::bf16; }
  std::string name(const Kernels& table) const {
    return std::string(table.name) + " load " + std::to_string(int(load)) + " divergence " +
           std::to_string(int(divergence)) + " hard " + std::to_string(int(hard)) + " size " +
           std::to_string(size);
  }
};

static double temperature(Hard hard) {
  return hard == Hard::power2 ? 2 : hard == Hard::power4 ? 4 : hard == Hard::separate ? 1.7 : 1;
}

// f32_any: every third entry is what the driver puts for -inf, every fifth underflows. An entry
// that is -inf on one side alone is left out if the divergence is infinite with it.
static bool may_be_alone(Divergence d, int side) {
  return with_rule(d, [&](auto rule) {
    return !rule.SOFTMAX || !is_infinite<decltype(rule)>(side == 0, side == 1);
  });
}
static Case make_case(Load load, Divergence d, Hard hard, int size) {
  Case c{load, d, hard, size, std::vector<float>(size), std::vector<float>(size), {}};
  std::mt19937 random(size + 10 * int(d) + 100 * int(hard));
  std::normal_distribution<float> normal(0, 4);
  double m[2] = {LOWEST, LOWEST};
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < size; ++i) {
      float& x = (side ? c.t : c.s)[i];
      x = 7 + normal(random);
      if (c.bf16()) x = from_bits(uint32_t(to_bf16(x)) << 16);
      m[side] = fmax(m[side], x);
      if (load != Load::f32_any) continue;
      if (i % 5 == 3) x = -500;
      if (i % 3 == 1 || (i % 7 == 2 && may_be_alone(d, side) && i % 2 == side)) x = LOWEST;
    }
  // the largest logit may be above the reference
  c.block.m_s = float(m[0] - 1.25);
  c.block.m_t = float(m[1]);
  c.block.size = size;
  c.block.k = float(LOG2E / temperature(hard));
  c.block.k_1 = float(LOG2E);
  return c;
}

struct Exact {  // one element in double
  double a, b, P, Q, E;
};
static Exact exact(const Case& c, int i) {
  const Block& o = c.block;
  Exact e;
  e.a = fmax(double(c.s[i]) - o.m_s, LOWEST);
  e.b = fmax(double(c.t[i]) - o.m_t, LOWEST);
  e.P = exp2(e.a * o.k);
  e.Q = exp2(e.b * o.k);
  e.E = exp2(e.a * o.k_1);
  return e;
}

static void check_sums(const Kernels& table, const Case& c) {
  Buffer s(c.s, c.bf16()), t(c.t, c.bf16());
  Block block = c.block;
  block.s = s.data();
  block.t = t.data();
  BlockSums got{};
  table.sums(c.load, c.divergence, c.hard, block, &got);
  double d_s = 0, d_t = 0, d_1 = 0, w = 0, terms = 0;
  double max_a = LOWEST, min_a = -LOWEST, max_b = LOWEST, min_b = -LOWEST;
  for (int i = 0; i < c.size; ++i) {
    const Exact e = exact(c, i);
    d_s += e.P, d_t += reads_teacher(c.divergence) ? e.Q : 0, d_1 += e.E;
    max_a = fmax(max_a, e.a), min_a = fmin(min_a, e.a);
    if (reads_teacher(c.divergence)) max_b = fmax(max_b, e.b), min_b = fmin(min_b, e.b);
    with_rule(c.divergence, [&](auto rule) {
      if constexpr (rule.OWN_SUM) {
        const bool raw = !rule.SOFTMAX;
        const double more = rule.accumulate(raw ? c.s[i] : e.a, raw ? c.t[i] : e.b, e.P, e.Q, 0.0);
        w += more;
        terms += fabs(more);
      }
    });
  }
  const double relative = tolerance(table, c.size);
  const std::string name = c.name(table);
  const bool softmax = with_rule(c.divergence, [](auto rule) { return rule.SOFTMAX; });
  if (softmax) {
    expect_near(got.d_s, d_s, relative * d_s, name + " d_s");
    expect_near(got.d_t, d_t, relative * d_t, name + " d_t");
    expect(got.max_b == float(max_b), name + " max_b", got.max_b, max_b);
    expect(got.min_b == float(min_b), name + " min_b", got.min_b, min_b);
  }
  if (c.divergence != Divergence::none) {
    expect_near(got.w, w, relative * terms, name + " w");
  }
  if (c.hard != Hard::off) {
    expect_near(got.d_1, d_1, 4 * relative * d_1, name + " d_1");
  }
  if (softmax || c.hard != Hard::off) {
    expect(got.max_a == float(max_a), name + " max_a", got.max_a, max_a);
    expect(got.min_a == float(min_a), name + " min_a", got.min_a, min_a);
  }
  if (c.load != Load::f32_any) {
    expect(std::isfinite(got.canary), name + " canary", got.canary, 0);
  }
}

static Constants<float> constants(const Case& c) {
  double d_s = 0, d_t = 0;
  for (int i = 0; i < c.size; ++i) {
    d_s += exact(c, i).P;
    d_t += exact(c, i).Q;
  }
  return {0.37f, float(d_s / d_t), 0.11f, 0.3f, float(std::log2(d_s / d_t))};
}
static Constants<double> in_double(const Constants<float>& c) {
  return {c.scale, c.ratio, c.offset, c.beta, c.log_ratio};
}

static void check_sums2(const Kernels& table, const Case& c) {
  Buffer s(c.s, c.bf16()), t(c.t, c.bf16());
  Block block = c.block;
  block.s = s.data();
  block.t = t.data();
  const Constants<float> k = constants(c);
  float x, y;
  table.sums2(c.load, c.divergence, block, k, &x, &y);
  double want_x = 0, want_y = 0, terms_x = 0, terms_y = 0;
  for (int i = 0; i < c.size; ++i) {
    const Exact e = exact(c, i);
    double more_x = 0, more_y = 0;
    with_rule(c.divergence, [&](auto rule) {
      if constexpr (rule.TWO_PASSES)
        rule.accumulate2(e.a, e.b, e.P, e.Q, double(block.k), in_double(k), more_x, more_y);
    });
    want_x += more_x, want_y += more_y;
    // a term is a difference, or a logarithm near 1, of numbers rounded relative to P and Q
    terms_x += fabs(more_x) + e.P + k.ratio * e.Q;
    terms_y += fabs(more_y) + e.P + k.ratio * e.Q;
  }
  const double relative = 2 * tolerance(table, c.size);
  expect_near(x, want_x, relative * terms_x, c.name(table) + " sums2 x");
  expect_near(y, want_y, relative * terms_y, c.name(table) + " sums2 y");
}

static Buffer run_gradient(const Kernels& table, const Case& c, bool in_place) {
  Buffer s(c.s, c.bf16()), t(c.t, c.bf16()), g(std::vector<float>(c.size, 99.0f), c.bf16());
  Block block = c.block;
  block.s = s.data();
  block.t = t.data();
  block.next_s = in_place ? nullptr : t.data();
  table.gradient(c.load, c.divergence, c.hard, block, constants(c), 0.29f, -0.013f,
                 in_place ? s.data() : g.data());
  return in_place ? std::move(s) : std::move(g);
}

static void check_gradient(const Kernels& table, const Case& c) {
  const Buffer got = run_gradient(table, c, false);
  const Constants<float> k = constants(c);
  // a polynomial of lower degree before rounding to bfloat16
  const double relative = (c.bf16() ? 4e-6 : 1e-6) + 2 * tolerance(table, 0);
  for (int i = 0; i < c.size; ++i) {
    const Exact e = exact(c, i);
    double want = -0.013f, terms = 0.013;
    with_rule(c.divergence, [&](auto rule) {
      const bool raw = !rule.SOFTMAX;
      const double a = raw ? c.s[i] : e.a, b = raw ? c.t[i] : e.b;
      const double part = rule.gradient(a, b, e.P, e.Q, double(c.block.k), in_double(k), 0.0);
      want += part;
      // what it is a difference of
      terms += fabs(part) + k.scale * (raw ? 0 : e.P * (1 + fabs(k.offset)) + k.ratio * e.Q);
    });
    if (c.hard != Hard::off) want += double(0.29f) * e.E, terms += 4 * e.E;
    const double rounding = c.bf16() ? fabs(want) / 256 : 0;
    // the sign of p - q is undecided if they agree to rounding
    if (c.divergence == Divergence::tvd) {
      const double q = k.ratio * e.Q;
      if (fabs(e.P - q) <= 1e-4 * fmax(e.P, q)) continue;
    }
    expect_near(got[i], want, relative * terms + rounding, c.name(table) + " gradient");
  }
  expect(got.same(run_gradient(table, c, true)), c.name(table) + " gradient in place", 0, 0);
}

// s - t, rounded once to bfloat16: ties, and carries into the exponent, in every lane.
static void check_rounding(const Kernels& table) {
  Case c = make_case(Load::bf16, Divergence::mse, Hard::off, 2048);
  std::mt19937 random(7);
  for (int i = 0; i < c.size; ++i) {
    c.s[i] = (i % 5 ? 1 : -1) * (1 + float(random() % 128) / 128);
    c.t[i] = float(int(random() % 9) - 4) / 512;  // half a unit and its multiples
  }
  Buffer s(c.s, true), t(c.t, true), g(c.s, true);
  c.block.s = s.data();
  c.block.t = t.data();
  table.gradient(c.load, c.divergence, c.hard, c.block, {1, 0, 0, 0, 0}, 0, 0, g.data());
  for (int i = 0; i < c.size; ++i) {
    const float want = from_bits(uint32_t(to_bf16(s[i] - t[i])) << 16);
    expect(g[i] == want, std::string(table.name) + " rounding", g[i], want);
  }
}

// AVX2 and AVX-512 do the same operations on an element, in vectors of another length. (A bfloat16
// conversion in hardware flushes subnormals: none here.)
static void check_same_bits(const Case& c) {
  const Kernels* first = nullptr;
  for (const Kernels* table : tables) {
    if (!strcmp(table->name, "generic")) continue;
    if (!first) first = table;
    expect(run_gradient(*first, c, false).same(run_gradient(*table, c, false)),
           c.name(*table) + " differs from " + first->name, 0, 0);
  }
}

// Maxima and minima are exact, the sum is finite exactly if every entry is, regardless of
// the place of the odd one; `sums` checks it too.
static void check_not_finite(const Kernels& table, bool bf16) {
  const Load load = bf16 ? Load::bf16 : Load::f32;
  const int size = 4 * MAX_PAIR;
  for (float odd : {INF, -INF, from_bits(0x7fc00000u), from_bits(0xffc00000u)})
    for (int at = 0; at < size; at += 1 + at / 70 * 10)
      for (int side = 0; side < 2; ++side)
        for (int d = 0; d < RULES; ++d) {
          const Divergence divergence = Divergence(d);
          if (!reads_teacher(divergence) && side) continue;
          Case c = make_case(load, divergence, Hard::power1, size);
          if (divergence == Divergence::mse) c.hard = Hard::separate;
          (side ? c.t : c.s)[at] = odd;
          Buffer s(c.s, bf16), t(c.t, bf16);
          c.block.s = s.data();
          c.block.t = t.data();
          const std::string name = c.name(table) + " entry " + std::to_string(at);
          BlockSums sums{};
          table.sums(load, divergence, c.hard, c.block, &sums);
          const bool seen = !std::isfinite(sums.canary) || !(fmax(sums.max_a, sums.max_b) < 100) ||
                            !(fmin(sums.min_a, sums.min_b) > -1e30);
          expect(seen, name + " sums noticed", sums.canary, odd);
          Range range{};
          table.range(load, s.data(), t.data(), size, &range);
          expect(std::isfinite(range.sum_s) == (side == 1), name + " sum_s", range.sum_s, odd);
          expect(std::isfinite(range.sum_t) == (side == 0), name + " sum_t", range.sum_t, odd);
        }
}

static void check_range(const Kernels& table, bool bf16, int size) {
  const Load load = bf16 ? Load::bf16 : Load::f32;
  for (int at = 0; at < size; at += 1 + size / 100) {  // the extremes come to every lane
    Case c = make_case(load, Divergence::mse, Hard::off, size);
    c.s[at] = 77, c.t[at] = -78, c.s[size - 1 - at] = -79, c.t[size - 1 - at] = 80;
    Buffer s(c.s, bf16), t(c.t, bf16);
    Range r{};
    table.range(load, s.data(), t.data(), size, &r);
    const std::string name = c.name(table) + " range";
    expect(r.max_s == 77 && r.min_s == -79, name, r.max_s, 77);
    expect(r.max_t == 80 && r.min_t == -78, name, r.max_t, 80);
    expect(std::isfinite(r.sum_s) && std::isfinite(r.sum_t), name, r.sum_s, r.sum_t);
  }
}

// e^(s - m) alone, over the whole range that the table says it takes, and below.
static void check_exponential(const Kernels& table) {
  const bool fused = strcmp(table.name, "generic") != 0;
  const double lowest = -double(table.exponent_range);
  std::vector<float> x;
  for (int i = 0; i < 64 * MAX_PAIR; ++i) {
    const double u = i / (64.0 * MAX_PAIR - 1);
    x.push_back(float((i % 2 ? 30 - 155 * u : 30 + (lowest - 30) * u) / LOG2E));
  }
  const auto run = [&](Load load, const std::vector<float>& values) {
    Buffer s(values, false), g(values, false);
    Block block{};
    block.s = block.t = s.data();
    block.size = int(values.size());
    block.k = block.k_1 = float(LOG2E);
    table.gradient(load, Divergence::none, Hard::power1, block, {}, 1.0f, 0.0f, g.data());
    return g;
  };
  const Buffer plain = run(Load::f32, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double exponent = x[i] * double(float(LOG2E)), want = exp2(exponent);
    const double relative = fused ? 2.5e-7 : 2.5e-7 + fabs(exponent) * 4.2e-8;
    expect_near(plain[i], want, relative * want + 1.5e-45,
                std::string(table.name) + " 2^" + std::to_string(exponent));
  }
  for (float& value : x) value = fminf(value, 0) * 3;
  x[1] = x[33] = LOWEST;
  const Buffer any = run(Load::f32_any, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double exponent = x[i] * double(float(LOG2E)), want = exp2(exponent);
    const double relative = fused ? 2.5e-7 : 2.5e-7 + fabs(exponent) * 4.2e-8;
    const bool edge = fabs(exponent + 125) < 0.01;  // on one side 2^-125, on the other 0
    expect_near(any[i], exponent < -125 ? 0 : want, edge ? 3e-38 : relative * want,
                std::string(table.name) + " f32_any 2^" + std::to_string(exponent));
  }
}

// All 65536 patterns of a 16-bit type, forth and back; float values between and next to them.
static void check_conversions(const Kernels& table, Dtype dtype) {
  const std::string name = std::string(table.name) + " dtype " + std::to_string(int(dtype));
  std::vector<uint16_t> patterns(65536 + 5), back(patterns.size());
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = uint16_t(i);
  std::vector<float> widened(patterns.size()), want(patterns.size());
  table.widen(dtype, patterns.data(), widened.data(), int(widened.size()));
  kernels_generic.widen(dtype, patterns.data(), want.data(), int(widened.size()));
  table.narrow(dtype, widened.data(), back.data(), int(widened.size()));
  for (size_t i = 0; i < widened.size(); ++i) {
    const bool nan = std::isnan(want[i]);
    expect(nan ? std::isnan(widened[i]) : to_bits(widened[i]) == to_bits(want[i]), name + " widen",
           widened[i], want[i]);
    expect(nan || back[i] == patterns[i], name + " there and back", back[i], patterns[i]);
  }
  std::vector<float> values;
  std::mt19937 random(5);
  for (int i = 0; i < 100003; ++i) {
    // ties and their neighbours in every exponent
    const uint32_t low = i % 3 == 0 ? 0x8000u : i % 3 == 1 ? 0x1000u : uint32_t(random());
    const float x = from_bits((uint32_t(random()) & 0xffffe000u) ^ low);
    values.push_back(std::isnan(x) ? 1.0f : x);
  }
  std::vector<uint16_t> got(values.size()), exact(values.size());
  table.narrow(dtype, values.data(), got.data(), int(values.size()));
  kernels_generic.narrow(dtype, values.data(), exact.data(), int(values.size()));
  for (size_t i = 0; i < values.size(); ++i)
    expect(got[i] == exact[i], name + " narrow", got[i], exact[i]);
}

static void check_plain_loops(const Kernels& table) {
  for (int size : {0, 1, 7, 31, 32, 33, 2047, 2048}) {
    const Case c = make_case(Load::f32, Divergence::mse, Hard::off, size);
    Buffer s(c.s, false);
    double want = 0, terms = 0;
    for (float x : c.s) want += double(x) - 3.5, terms += fabs(x - 3.5);
    const float got = table.differences(reinterpret_cast<float*>(s.data()), size, 3.5f);
    expect_near(got, want, 1e-5 * terms, std::string(table.name) + " differences");
    for (bool bf16 : {false, true}) {
      Buffer scaled(c.s, bf16), original(c.s, bf16);
      table.scale(bf16 ? Dtype::bf16 : Dtype::f32, scaled.data(), size, 0.25f);
      for (int i = 0; i < size; ++i)
        expect(scaled[i] == 0.25f * original[i], std::string(table.name) + " scale", scaled[i],
               0.25f * original[i]);
    }
  }
}

int main() {
  for (const Kernels* table : tables) {
    check_exponential(*table);
    check_plain_loops(*table);
    check_rounding(*table);
    check_conversions(*table, Dtype::bf16);
    check_conversions(*table, Dtype::f16);
    for (bool bf16 : {false, true}) {
      check_not_finite(*table, bf16);
      for (int size : {32, 96, 2048}) check_range(*table, bf16, size);
    }
  }
  for (int size : {32, 96, 2048})
    for (Load load : {Load::f32, Load::bf16, Load::f32_any})
      for (int d = 0; d < RULES; ++d)
        for (int h = 0; h <= int(Hard::separate); ++h) {
          const Divergence divergence = Divergence(d);
          const Hard hard = Hard(h);
          const bool soft = divergence != Divergence::none;
          const auto [softmax, two_passes] = with_rule(divergence, [](auto rule) {
            return std::pair<bool, bool>(rule.SOFTMAX, rule.TWO_PASSES);
          });
          // the combinations that the driver uses
          if (!soft && hard != Hard::power1) continue;
          if (soft && !softmax && hard != Hard::off && hard != Hard::separate) continue;
          if (soft && !softmax && load == Load::f32_any) continue;
          const Case c = make_case(load, divergence, hard, size);
          for (const Kernels* table : tables) {
            check_sums(*table, c);
            if (two_passes) check_sums2(*table, c);
            check_gradient(*table, c);
          }
          check_same_bits(c);
        }
  return finish();
}
