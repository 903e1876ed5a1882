// The row driver over every instruction set of this processor, without torch: shapes, element
// types, strides, infinities, threads, dense and top-k teachers. Built with the sanitizers it shows
// every access outside a tensor; without them it still shows a write between the rows, and bits
// that depend on the threads.
//
// Buffers have their exact size and an odd alignment; gaps between strided rows hold NaN.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/measure.h"
#include "../../csrc/cpu/rows.h"
#include "check.h"

using namespace fused_kd;

static constexpr float NaN = std::numeric_limits<float>::quiet_NaN();
// Rows of V elements in two leading dimensions; `gap` elements are between rows, `outer_gap` more
// between groups of `inner` rows, none behind the last row.
struct Matrix {
  Rows rows;
  int64_t N, V, elements;
  std::unique_ptr<char[]> memory;

  Matrix(Dtype dtype, int64_t N, int64_t V, int64_t inner, int64_t gap, int64_t outer_gap)
      : N(N), V(V) {
    const int64_t stride = V + gap, outer = inner * stride + outer_gap;
    elements = (N - 1) / inner * outer + (N - 1) % inner * stride + V;
    memory.reset(new char[(elements + 1) * width(dtype)]);
    rows = {memory.get() + width(dtype), dtype, inner, outer, stride};
    const std::vector<float> fill(elements, NaN);
    kernels().narrow(dtype, fill.data(), rows.data, int(elements));
  }
  char* row(int64_t n) const {
    return static_cast<char*>(rows.data) +
           (n / rows.inner * rows.outer_stride + n % rows.inner * rows.inner_stride) *
               width(rows.dtype);
  }
  void set(int64_t n, const std::vector<float>& values) {
    kernels().narrow(rows.dtype, values.data(), row(n), int(V));
  }
  std::vector<float> get(int64_t n) const {
    std::vector<float> values(V);
    kernels().widen(rows.dtype, row(n), values.data(), int(V));
    return values;
  }
  // Whether everything that belongs to no row is still NaN.
  bool gaps_untouched() const {
    std::vector<char> inside(elements, 0);
    std::vector<float> all(elements);
    for (int64_t n = 0; n < N; ++n)
      memset(&inside[(row(n) - static_cast<char*>(rows.data)) / width(rows.dtype)], 1, V);
    kernels().widen(rows.dtype, rows.data, all.data(), int(elements));
    for (int64_t i = 0; i < elements; ++i)
      if (!inside[i] && !std::isnan(all[i])) return false;
    return true;
  }
};

// Parts one after the other, the last one first, as many as there are "threads".
template <int THREADS>
static void split(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  for (int part = THREADS; part-- > 0;) {
    const int64_t begin = n * part / THREADS, end = n * (part + 1) / THREADS;
    if (begin < end) body(context, begin, end);
  }
}
static const Parallel one_thread{split<1>, 1}, three_threads{split<3>, 3};

struct Setting {
  int64_t N, V;
  Dtype student, teacher;
  Divergence divergence;
  double temperature, label_smoothing;
  bool hard, soft, in_place;
  int regime;
  int64_t K = -1;  // of a top-k teacher, which is float32; -1: a dense teacher
  bool has_classes() const { return K >= 0; }
  std::string name() const {
    return std::string(kernels().name) + " N " + std::to_string(N) + " V " + std::to_string(V) +
           " dtypes " + std::to_string(int(student)) + std::to_string(int(teacher)) +
           " divergence " + std::to_string(int(divergence)) + " T " + std::to_string(temperature) +
           " regime " + std::to_string(regime) + (hard ? " hard" : "") + (soft ? " soft" : "") +
           (in_place ? " in place" : "") + (has_classes() ? " K " + std::to_string(K) : "");
  }
};

enum Regime { plain, infinite, spread, not_a_number, REGIMES };

// Logits of one row, each exact in every type.
static std::vector<float> logits(const Setting& c, int64_t n, int side) {
  std::mt19937 random(unsigned(1000 * n + 10 * side + c.regime));
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> x(c.V);
  for (int64_t v = 0; v < c.V; ++v) {
    x[v] = roundf(8 * normal(random)) / 8;
    if (c.regime == spread) x[v] *= 64;
    if (c.regime == infinite && v % 3 == 1) x[v] = -INF;                  // on both sides
    if (c.regime == infinite && n % 2 && v % 7 == 3 + side) x[v] = -INF;  // on one
  }
  if (c.regime == not_a_number && n % 2) x[c.V - 1 - n % c.V] = side ? INF : NaN;
  return x;
}

// The tokens of one row, spread over the vocabulary; every fifth is absent, by any id outside of it.
static std::vector<int32_t> tokens(const Setting& c, int64_t n) {
  static const int32_t outside[] = {-1, int32_t(c.V), std::numeric_limits<int32_t>::max(),
                                    std::numeric_limits<int32_t>::min()};
  std::vector<int32_t> ids(c.K);
  for (int64_t i = 0; i < c.K; ++i)
    ids[i] = i % 5 == 4 ? outside[i / 5 % 4] : int32_t((c.V - 1 + n % c.V + i * (c.V / c.K)) % c.V);
  return ids;
}

// The teacher's logits of the K+1 classes. Those of absent tokens are not read. The tail has a mass,
// or none, or is no class, except where that makes a divergence infinite or leaves no class.
static std::vector<float> class_logits(const Setting& c, int64_t n) {
  const std::vector<int32_t> ids = tokens(c, n);
  const std::vector<float> dense = logits(c, n, 1);
  const bool may_be_zero =
      with_rule(c.divergence, [](auto rule) { return !is_infinite<decltype(rule)>(false, true); });
  std::vector<float> x(c.K + 1, NaN);
  int64_t present = 0;
  for (int64_t i = 0; i < c.K; ++i)
    if (ids[i] >= 0 && ids[i] < c.V) x[i] = dense[ids[i]], ++present;
  const float tails[] = {1.5f, INF, may_be_zero ? -INF : INF};
  x[c.K] = present == 0 ? 0 : present == c.V ? INF : tails[n % 3];
  if (c.regime == not_a_number && n % 4 == 1) x.assign(c.K + 1, NaN);
  return x;
}

struct Outcome {
  std::vector<float> hard, soft, stats, measures;
  std::vector<std::vector<float>> grad;
};
static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * 4);
}

// What kd_metrics needs of the same rows, which are not written; and the largest entries.
static std::vector<float> measure(const Setting& c, Problem p, const float* weight,
                                  const int64_t* labels, const Parallel& parallel) {
  std::vector<float> zeros(c.K + 1);
  p.labels = labels;
  p.w_hard = p.w_soft = weight;
  p.divergence = Divergence::forward_kl;
  p.label_smoothing = 0;
  const int columns = c.has_classes() ? SUPPORT_MEASURES : MEASURES;
  std::vector<float> sums(c.N * columns, 7);
  std::vector<int64_t> largest(c.N * (c.has_classes() ? 1 : 2));
  if (c.has_classes()) {
    p.teacher = {zeros.data(), Dtype::f32, 1, 0, 0};
    measure_support(p, sums.data(), largest.data(), parallel);
  } else {
    measure_rows(p, sums.data(), largest.data(), parallel);
  }
  for (int64_t i : largest) expect(i >= 0 && i < c.V, c.name() + ": largest entry");
  sums.insert(sums.end(), largest.begin(), largest.end());
  return sums;
}

static Outcome run(const Setting& c, const Parallel& parallel, bool separately) {
  const int64_t inner = c.N > 2 ? 2 : 1;
  Matrix student(c.student, c.N, c.V, inner, 3, 5);
  Matrix teacher(c.teacher, c.N, c.has_classes() ? c.K + 1 : c.V, inner, 1, 0);
  std::vector<int32_t> ids;
  Matrix grad(c.student, c.N, c.V, inner, 0, 2);
  std::vector<int64_t> labels(c.N);
  std::vector<float> w_hard(c.N), w_soft(c.N);
  for (int64_t n = 0; n < c.N; ++n) {
    student.set(n, logits(c, n, 0));
    teacher.set(n, c.has_classes() ? class_logits(c, n) : logits(c, n, 1));
    if (c.has_classes())
      for (int32_t id : tokens(c, n)) ids.push_back(id);
    labels[n] = n == 4 ? c.V : n == 5 ? -1 : n * 7919 % c.V;  // two labels outside
    w_hard[n] = n % 4 == 3 ? 0.0f : 0.5f;
    w_soft[n] = n % 8 == 3 ? 0.0f : 0.25f;
  }
  Outcome out{std::vector<float>(c.N, 7),
              std::vector<float>(c.N, 7),
              std::vector<float>(c.N * STATS, 7),
              {},
              {}};
  const Matrix& target = c.in_place ? student : grad;
  Problem p{};
  p.N = c.N;
  p.V = c.V;
  p.student = student.rows;
  p.teacher = teacher.rows;
  p.has_classes = c.has_classes();
  p.K = c.K;
  p.token_ids = ids.data();
  p.labels = c.hard ? labels.data() : nullptr;
  p.w_hard = c.hard ? w_hard.data() : nullptr;
  p.w_soft = c.soft ? w_soft.data() : nullptr;
  p.divergence = c.divergence;
  p.temperature = c.temperature;
  p.beta = 0.3;
  p.soft_factor = c.temperature * c.temperature;
  p.label_smoothing = c.label_smoothing;
  p.hard = out.hard.data();
  p.soft = out.soft.data();
  p.stats = out.stats.data();
  out.measures = measure(c, p, w_hard.data(), labels.data(), parallel);
  if (!separately) p.grad = target.rows;
  rows_forward(p, parallel);
  if (separately) {
    p.grad = target.rows;
    rows_backward(p, parallel);
  }
  for (int64_t n = 0; n < c.N; ++n) out.grad.push_back(target.get(n));
  expect(student.gaps_untouched() && grad.gaps_untouched() && teacher.gaps_untouched(),
         c.name() + ": wrote between the rows");
  for (int64_t n = 0; n < c.N; ++n) scale_row(target.rows, n, c.V, 0.5f);
  expect(target.gaps_untouched(), c.name() + ": scale_row wrote between the rows");
  return out;
}

static void check_finite(const Setting& c, const Outcome& out) {
  if (c.regime != plain && c.regime != spread) return;
  for (int64_t n = 0; n < c.N; ++n) {
    if (c.hard && (n == 4 || n == 5)) continue;
    bool finite = std::isfinite(out.hard[n]) && std::isfinite(out.soft[n]);
    for (float g : out.grad[n]) finite &= std::isfinite(g);
    expect(finite, c.name() + ": not finite in row " + std::to_string(n));
  }
}

// The ways to the same row: in place or not, at once or in two calls, with one thread or three.
static Outcome check_ways(Setting c) {
  Outcome want = run(c, one_thread, false);
  check_finite(c, want);
  Setting swapped = c;
  swapped.in_place = !c.in_place;
  const Outcome others[] = {run(c, three_threads, false), run(c, one_thread, true),
                            run(swapped, three_threads, true)};
  for (const Outcome& other : others) {
    const std::string name =
        c.name() + ": other bits, way " + std::to_string(&other - others) + " ";
    expect(same_bits(want.hard, other.hard) && same_bits(want.soft, other.soft), name + "losses");
    expect(same_bits(want.stats, other.stats), name + "statistics");
    expect(same_bits(want.measures, other.measures), name + "measures");
    for (int64_t n = 0; n < c.N; ++n) expect(same_bits(want.grad[n], other.grad[n]), name + "grad");
  }
  return want;
}

static bool near(const std::vector<float>& a, const std::vector<float>& b, double relative) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (a[i] == b[i]) continue;  // infinities too
    if (!(fabs(a[i] - b[i]) <= 2e-5 + relative * fabs(b[i]))) return false;
  }
  return true;
}

// Another instruction set against the first.
static void check_close(const Setting& c, const Outcome& got, const Outcome& want) {
  expect(near(got.hard, want.hard, 2e-5) && near(got.soft, want.soft, 2e-5), c.name() + ": losses");
  expect(near(got.measures, want.measures, 1e-4), c.name() + ": measures");
  if (c.divergence == Divergence::tvd) return;  // the sign of p - q may be undecided
  const double rounding = c.student == Dtype::f32 ? 2e-5 : 1.0 / 128;
  for (int64_t n = 0; n < c.N; ++n)
    expect(near(got.grad[n], want.grad[n], rounding), c.name() + ": grad " + std::to_string(n));
}

static void check_tables(const Setting& c, const std::vector<const char*>& tables) {
  Outcome first;
  for (const char* table : tables) {
    choose_kernels(table);
    const Outcome got = check_ways(c);
    table == tables.front() ? void(first = got) : check_close(c, got, first);
  }
}

// V x dtypes x regimes; with the divergences crossed too, or in turn.
static void check_all(const std::vector<const char*>& tables, int64_t N, bool crossed,
                      const std::vector<int64_t>& vocabularies) {
  const Dtype dtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  const double temperatures[] = {1, 2, 4, 1.7, 0.05};
  unsigned turn = 0;
  for (int64_t V : vocabularies)
    for (Dtype student : dtypes)
      for (Dtype teacher : dtypes)
        for (int regime = 0; regime < REGIMES; ++regime)
          for (int d = 0; d < (crossed ? NUMBER_OF_DIVERGENCES : 1); ++d) {
            const Divergence divergence =
                Divergence(crossed ? d : int(turn % NUMBER_OF_DIVERGENCES));
            const int terms = turn / 3 % 7;  // mostly both
            const Setting c{N,
                            V,
                            student,
                            teacher,
                            divergence,
                            temperatures[turn / 5 % 5],
                            turn % 3 ? 0.0 : 0.1,
                            terms != 1,
                            terms != 2,
                            turn % 2 == 0,
                            regime};
            ++turn;
            check_tables(c, tables);
          }
}

// A top-k teacher: V x K x dtypes x regimes, the rest in turn.
static void check_classes(const std::vector<const char*>& tables, int64_t N,
                          const std::vector<int64_t>& vocabularies,
                          const std::vector<int64_t>& numbers_of_tokens) {
  const double temperatures[] = {1, 2, 4, 1.7, 0.05, 8};
  unsigned turn = 0;
  for (int64_t V : vocabularies)
    for (int64_t K : numbers_of_tokens) {
      if (K > V) continue;
      for (Dtype student : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (int regime = 0; regime < REGIMES; ++regime) {
          const int terms = turn / 3 % 7;  // mostly both
          Setting c{N,
                    V,
                    student,
                    Dtype::f32,
                    Divergence(turn % NUMBER_OF_DIVERGENCES),
                    temperatures[turn / 5 % 6],
                    turn % 3 ? 0.0 : 0.1,
                    terms != 1,
                    terms != 2,
                    turn % 2 == 0,
                    regime,
                    K};
          if (c.divergence == Divergence::mse) c.divergence = Divergence::forward_kl;
          ++turn;
          check_tables(c, tables);
        }
    }
}

int main(int argc, char** argv) {  // names of instruction sets
  const std::vector<const char*> tables(argv + 1, argv + argc);
  check_all(tables, 9, true, {1, 2, 33, 127});
  check_all(tables, 6, false, {31, 32, 2047, 2048, 2049, 4096 + 33});
  check_all(tables, 1, false, {32768 + 32, 70001});  // several segments, fewer rows than threads
  check_classes(tables, 9, {1, 2, 33, 127}, {0, 1, 2, 14, 33, 127});
  check_classes(tables, 6, {2047, 2048, 4096 + 33}, {14, 2048});
  check_classes(tables, 1, {32768 + 32}, {0, 70});
  return finish();
}
