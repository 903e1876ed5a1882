// What happens to a row, independent of the instruction set: its blocks, maxima, infinities, label,
// constants.
//
// A row is cut into segments of SEGMENT entries and those into blocks; sums are folded block by
// block, then segment by segment, always in that order, so its bits depend on V and the element
// types alone. A thread takes whole rows (statistics, then the gradient while the row is in cache)
// or, where there are few rows, segments.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace fused_kd {

namespace {

constexpr int64_t SEGMENT = 16 * BLOCK;
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float NaN = std::numeric_limits<float>::quiet_NaN();
constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double LOG2E = 1.4426950408889634074;

enum Flag : int {
  BAD_S = 1,       // NaN or +inf in the student, or nothing finite
  BAD_T = 2,       // the same of the teacher
  ALONE_S = 4,     // an entry is -inf for the student alone
  ALONE_T = 8,     // an entry is -inf for the teacher alone
  IRREGULAR = 16,  // some block needs more than the plain kernels: infinities, or exponents beyond
                   // their range
};

struct State {  // of a segment, then of a row
  RowSums<double> r{LOWEST, LOWEST, 0, 0, 0, 0, 0, 0, 0, 0};
  float min_s = -LOWEST, min_t = -LOWEST;
  int flags = 0;
};

template <class Call>
auto with_rule(Divergence d, Call call) {
  switch (d) {
    case Divergence::forward_kl: return call(Rule<Divergence::forward_kl>{});
    case Divergence::reverse_kl: return call(Rule<Divergence::reverse_kl>{});
    case Divergence::jsd: return call(Rule<Divergence::jsd>{});
    case Divergence::tvd: return call(Rule<Divergence::tvd>{});
    default: return call(Rule<Divergence::mse>{});
  }
}

char* row_pointer(const Rows& rows, int64_t n) {
  const int64_t element =
      (n / rows.inner) * rows.outer_stride + (n % rows.inner) * rows.inner_stride;
  return static_cast<char*>(rows.data) + element * width(rows.dtype);
}

float read(const char* row, Dtype dtype, int64_t v, const Kernels& table) {
  float x;
  table.widen(dtype, row + v * width(dtype), &x, 1);
  return x;
}

// One row as the kernels see it: where it lies, which terms are on, and how its hard exponential is
// made.
struct Row {
  const Problem& problem;
  const Kernels& table;
  int64_t n;
  const char *s, *t;
  Dtype s_dtype, t_dtype;
  bool hard, soft;
  Divergence divergence;
  Hard hard_mode;
  float k, k_1, k_max;
  float exponent_range;  // largest |exponent| that the plain kernels take for this divergence

  Row(const Problem& p, const Kernels& table, int64_t n) : problem(p), table(table), n(n) {
    hard = p.w_hard && p.w_hard[n] != 0;
    soft = p.w_soft && p.w_soft[n] != 0;
    s = row_pointer(p.student, n);
    s_dtype = p.student.dtype;
    // without a divergence the student stands in for the teacher, so that the teacher's memory
    // isn't read
    t = soft ? row_pointer(p.teacher, n) : s;
    t_dtype = soft ? p.teacher.dtype : s_dtype;
    divergence = soft ? p.divergence : Divergence::none;
    k_1 = float(LOG2E);
    k = soft ? float(LOG2E / p.temperature) : k_1;
    k_max = std::max(k, k_1);
    exponent_range = table.exponent_range;
    // jsd takes the logarithm of p/m: p = P/d_s and the ratio must both be normal numbers
    if (divergence == Divergence::jsd) exponent_range = std::min(exponent_range, 100.0f);
    hard_mode = Hard::separate;
    if (!hard)
      hard_mode = Hard::off;
    else if (!soft)
      hard_mode = Hard::power1;
    else if (divergence == Divergence::mse)
      hard_mode = Hard::separate;
    else if (p.temperature == 1)
      hard_mode = Hard::power1;
    else if (p.temperature == 2)
      hard_mode = Hard::power2;
    else if (p.temperature == 4)
      hard_mode = Hard::power4;
  }
  bool skipped() const { return !hard && !soft; }
  int64_t segments() const { return (problem.V + SEGMENT - 1) / SEGMENT; }
};

// A block made ready for the kernels: in place where its type allows, else as float32 copies with
// infinities replaced.
struct Prepared {
  Load load;
  const void *s, *t;
  int size, padded;
  Range range;
  int flags = 0;
  int absent = 0;
  bool copied;
};

struct Scratch {
  alignas(64) float s[BLOCK];
  alignas(64) float t[BLOCK];
  alignas(64) float g[BLOCK];
};

// Infinities and NaN, entry by entry, of a block that was found to have some. -inf becomes the
// lowest float, whose exponential is exactly 0, and finite values stay above it; an absent entry so
// contributes nothing to any sum.
void replace_infinities(const Row& row, int64_t begin, Scratch& scratch, Prepared& block) {
  const bool ask_teacher = !row.soft && row.problem.label_smoothing > 0;
  const char* teacher = ask_teacher ? row_pointer(row.problem.teacher, row.n) : nullptr;
  Range r{LOWEST, -LOWEST, 0, LOWEST, -LOWEST, 0};
  for (int i = 0; i < block.size; ++i) {
    float &s = scratch.s[i], &t = scratch.t[i];
    const bool none_s = s == -INF;
    bool none_t = t == -INF;
    if (ask_teacher && none_s)
      none_t = read(teacher, row.problem.teacher.dtype, begin + i, row.table) == float(-INF);
    if (none_s && none_t)
      ++block.absent;
    else if (none_s)
      block.flags |= ALONE_S;
    else if (none_t)
      block.flags |= ALONE_T;
    if (!(s < INF)) block.flags |= BAD_S;
    if (!(t < INF)) block.flags |= BAD_T;
    s = none_s ? LOWEST : std::max(s, -3e38f);
    t = none_t ? LOWEST : std::max(t, -3e38f);
    r.max_s = std::max(r.max_s, s);
    r.max_t = std::max(r.max_t, t);
  }
  r.min_s = r.min_t = LOWEST;
  block.range = r;
  block.flags |= IRREGULAR;
}

void copy_block(const Row& row, int64_t begin, Scratch& scratch, Prepared& block) {
  row.table.widen(row.s_dtype, row.s + begin * width(row.s_dtype), scratch.s, block.size);
  row.table.widen(row.t_dtype, row.t + begin * width(row.t_dtype), scratch.t, block.size);
  block.padded = (block.size + MAX_PAIR - 1) / MAX_PAIR * MAX_PAIR;
  for (int i = block.size; i < block.padded; ++i) scratch.s[i] = scratch.t[i] = LOWEST;
  block.s = scratch.s;
  block.t = scratch.t;
  block.load = Load::f32;
  block.copied = true;
}

// The block where it lies if the kernels can read it there, else a float32 copy.
Prepared view(const Row& row, int64_t begin, int64_t end, Scratch& scratch) {
  Prepared block;
  block.size = block.padded = int(std::min<int64_t>(BLOCK, end - begin));
  block.copied = false;
  if (row.s_dtype != row.t_dtype || row.s_dtype == Dtype::f16 || block.size % MAX_PAIR != 0) {
    copy_block(row, begin, scratch, block);
    return block;
  }
  block.load = row.s_dtype == Dtype::bf16 ? Load::bf16 : Load::f32;
  block.s = row.s + begin * width(row.s_dtype);
  block.t = row.t + begin * width(row.t_dtype);
  return block;
}

void measure(const Row& row, const Scratch& scratch, Prepared& block) {
  Range& r = block.range;
  const int whole = block.size / MAX_PAIR * MAX_PAIR;
  row.table.range(block.load, block.s, block.t, whole, &r);
  for (int i = whole; i < block.size; ++i) {  // copied, then
    r.max_s = std::max(r.max_s, scratch.s[i]);
    r.min_s = std::min(r.min_s, scratch.s[i]);
    r.max_t = std::max(r.max_t, scratch.t[i]);
    r.min_t = std::min(r.min_t, scratch.t[i]);
    r.sum_s += scratch.s[i];
    r.sum_t += scratch.t[i];
  }
}

// Without a finite logit so far any reference will do: every exponential is 0.
float reference(double m) { return m == LOWEST ? 0.0f : float(m); }

// A view that the kernels can take whatever is in it. `m_s`, `m_t`: the references so far; the
// exponents' range is judged against them and the block's own maxima.
Prepared prepare(const Row& row, int64_t begin, int64_t end, double m_s, double m_t,
                 Scratch& scratch) {
  Prepared block = view(row, begin, end, scratch);
  measure(row, scratch, block);
  if (!std::isfinite(block.range.sum_s) || !std::isfinite(block.range.sum_t)) {
    if (!block.copied) copy_block(row, begin, scratch, block);
    replace_infinities(row, begin, scratch, block);
  }
  const Range& r = block.range;
  const double spread = std::max<double>(reference(std::max<double>(m_s, r.max_s)) - r.min_s,
                                         reference(std::max<double>(m_t, r.max_t)) - r.min_t);
  if (block.padded != block.size || !(spread * row.k_max <= row.exponent_range)) {
    if (!block.copied) copy_block(row, begin, scratch, block);
    block.load = Load::f32_any;
  }
  return block;
}

Block kernel_block(const Row& row, const Prepared& block, double m_s, double m_t) {
  return {block.s, block.t, block.padded, reference(m_s), reference(m_t), row.k, row.k_1};
}

// Expresses a state's sums relative to larger references.
void rebase(const Row& row, State& state, double m_s, double m_t) {
  RowSums<double>& r = state.r;
  if (m_s == r.m_s && m_t == r.m_t) return;
  const double shift_s = r.m_s - m_s, shift_t = r.m_t - m_t;
  const double factor_s = exp2(shift_s * row.k), factor_t = exp2(shift_t * row.k);
  if (row.soft)
    r.w = with_rule(row.divergence, [&](auto rule) {
      return rule.rebase(r, shift_s, shift_t, factor_s, factor_t);
    });
  r.d_s *= factor_s;
  r.d_t *= factor_t;
  r.d_1 *= exp2(shift_s * row.k_1);
  if (r.count > 0) r.differences += r.count * shift_s;
  r.m_s = m_s;
  r.m_t = m_t;
}

void add(RowSums<double>& to, const RowSums<double>& from) {
  to.d_s += from.d_s;
  to.d_t += from.d_t;
  to.d_1 += from.d_1;
  to.w += from.w;
  to.differences += from.differences;
  to.count += from.count;
}

void merge(const Row& row, State& to, State from) {
  const double m_s = std::max(to.r.m_s, from.r.m_s), m_t = std::max(to.r.m_t, from.r.m_t);
  rebase(row, to, m_s, m_t);
  rebase(row, from, m_s, m_t);
  add(to.r, from.r);
  to.min_s = std::min(to.min_s, from.min_s);
  to.min_t = std::min(to.min_t, from.min_t);
  to.flags |= from.flags;
}

// sum of s - m over the present entries of a block
double differences(const Row& row, int64_t begin, const Prepared& block, float m,
                   Scratch& scratch) {
  if (!block.copied)
    row.table.widen(row.s_dtype, row.s + begin * width(row.s_dtype), scratch.s, block.size);
  if (!block.absent) return row.table.differences(scratch.s, block.size, m);
  double total = 0;
  for (int i = 0; i < block.size; ++i)
    if (scratch.s[i] != LOWEST) total += scratch.s[i] - m;
  return total;
}

template <class Body>
void for_blocks(const Row& row, int64_t segment, Body body) {
  const int64_t end = std::min(row.problem.V, (segment + 1) * SEGMENT);
  for (int64_t begin = segment * SEGMENT; begin < end; begin += BLOCK) body(begin, end);
}

// The references that every segment of a row starts from: the maxima of the row's first block.
State initial_state(const Row& row, Scratch& scratch) {
  const Prepared block = prepare(row, 0, row.problem.V, LOWEST, LOWEST, scratch);
  State state;
  state.r.m_s = block.range.max_s;
  state.r.m_t = block.range.max_t;
  return state;
}

// A reference may stay this far below the largest logit. It is itself a logit of the row, or was
// the largest of what came before: a row with an entry of probability above e^4/(1 + e^4) = 0.982
// so has that entry's logit as its reference, and the cross-entropy of a confident row is the
// logarithm of a sum that is exactly 1 or more.
constexpr float SLACK = 4.0f;
// The same in powers of two, where the temperature is low: exponentials must stay far from
// overflow.
constexpr float SLACK_EXPONENT = 32.0f;

// Sums the block as if it held nothing out of the ordinary; false if it did, and then nothing was
// added.
bool add_plain(const Row& row, const Prepared& block, State& state, BlockSums& sums) {
  if (block.padded != block.size || state.r.m_s == LOWEST || state.r.m_t == LOWEST) return false;
  row.table.sums(block.load, row.divergence, row.hard_mode,
                 kernel_block(row, block, state.r.m_s, state.r.m_t), &sums);
  const float lowest = std::min(sums.min_a, sums.min_b), highest = std::max(sums.max_a, sums.max_b);
  return std::isfinite(sums.canary) && highest <= SLACK && highest * row.k_max <= SLACK_EXPONENT &&
         -lowest * row.k_max <= row.exponent_range;
}

// Looks at the block first: the references grow to its maxima, infinities are replaced,
// exponentials may underflow.
Prepared add_any(const Row& row, int64_t begin, int64_t end, State& state, BlockSums& sums,
                 Scratch& scratch) {
  const Prepared block = prepare(row, begin, end, state.r.m_s, state.r.m_t, scratch);
  rebase(row, state, std::max<double>(state.r.m_s, block.range.max_s),
         std::max<double>(state.r.m_t, block.range.max_t));
  row.table.sums(block.load, row.divergence, row.hard_mode,
                 kernel_block(row, block, state.r.m_s, state.r.m_t), &sums);
  sums.min_a = block.range.min_s - reference(state.r.m_s);
  sums.min_b = block.range.min_t - reference(state.r.m_t);
  return block;
}

State first_visit(const Row& row, int64_t segment, State state, Scratch& scratch) {
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    BlockSums sums;
    Prepared block = view(row, begin, end, scratch);
    if (!add_plain(row, block, state, sums)) block = add_any(row, begin, end, state, sums, scratch);
    RowSums<double> more{};
    more.d_s = sums.d_s;
    more.d_t = sums.d_t;
    more.d_1 = sums.d_1;
    more.w = sums.w;
    more.count = block.size - block.absent;
    if (row.hard && row.problem.label_smoothing > 0)
      more.differences = differences(row, begin, block, reference(state.r.m_s), scratch);
    add(state.r, more);
    state.min_s = std::min(state.min_s, sums.min_a + reference(state.r.m_s));
    state.min_t = std::min(state.min_t, sums.min_b + reference(state.r.m_t));
    state.flags |= block.flags;
  });
  return state;
}

// Blocks of a row whose references are known: no need to look at them again unless the row is
// irregular.
Prepared prepare_again(const Row& row, const State& state, int64_t begin, int64_t end,
                       Scratch& scratch) {
  const bool irregular =
      (state.flags & IRREGULAR) || (std::min<int64_t>(BLOCK, end - begin) % MAX_PAIR);
  return irregular ? prepare(row, begin, end, state.r.m_s, state.r.m_t, scratch)
                   : view(row, begin, end, scratch);
}

Shape<double> shape(const Problem& p) { return {p.temperature, p.beta}; }

Constants<float> soft_constants(const Row& row, const State& state, double weight) {
  const Problem& p = row.problem;
  const Constants<double> c = with_rule(row.divergence, [&](auto rule) {
    return rule.constants(state.r, weight * p.soft_factor / p.temperature, shape(p));
  });
  return {float(c.scale), float(c.ratio), float(c.offset), float(c.beta)};
}

bool two_visits(const Row& row) {
  return row.soft &&
         with_rule(row.divergence, [](auto rule) { return decltype(rule)::TWO_VISITS; });
}

void second_visit(const Row& row, const State& state, int64_t segment, Scratch& scratch, double* x,
                  double* y) {
  const Constants<float> c = soft_constants(row, state, 1.0);
  *x = *y = 0;
  for_blocks(row, segment, [&](int64_t begin, int64_t end) {
    const Prepared block = prepare_again(row, state, begin, end, scratch);
    float bx = 0, by = 0;
    row.table.sums2(block.load, row.divergence, kernel_block(row, block, state.r.m_s, state.r.m_t),
                    c, &bx, &by);
    *x += bx;
    *y += by;
  });
}

// Marks what only the whole row knows.
void close(const Row& row, State& state) {
  if (state.r.m_s == LOWEST && (state.flags & IRREGULAR) && state.min_s == LOWEST)
    state.flags |= BAD_S;
  if (state.r.m_t == LOWEST && (state.flags & IRREGULAR) && state.min_t == LOWEST)
    state.flags |= BAD_T;
  const double spread = std::max(state.r.m_s - state.min_s, state.r.m_t - state.min_t);
  if (!(spread * row.k_max <= row.exponent_range)) state.flags |= IRREGULAR;
}

void save(const State& state, float* stats) {
  const double* values = &state.r.m_s;
  for (int i = 0; i < STATS - 1; ++i) stats[i] = float(values[i]);
  stats[STATS - 1] = float(state.flags);
}

State restore(const float* stats) {
  State state;
  double* values = &state.r.m_s;
  for (int i = 0; i < STATS - 1; ++i) values[i] = stats[i];
  state.flags = int(stats[STATS - 1]);
  return state;
}
static_assert(sizeof(RowSums<double>) == (STATS - 1) * sizeof(double),
              "the statistics are RowSums and the flags");

bool label_in_range(const Row& row) {
  return uint64_t(row.problem.labels[row.n]) < uint64_t(row.problem.V);
}

double hard_loss(const Row& row, const State& state) {
  if ((state.flags & BAD_S) || !label_in_range(row)) return NaN;
  const double eps = row.problem.label_smoothing;
  const float s_y = read(row.s, row.s_dtype, row.problem.labels[row.n], row.table);
  if (s_y == -INF || (eps > 0 && (state.flags & ALONE_S))) return INF;
  double loss = log(state.r.d_1) - (1 - eps) * (double(s_y) - state.r.m_s);
  if (eps > 0) loss -= eps / state.r.count * state.r.differences;
  return loss;
}

double soft_loss(const Row& row, const State& state) {
  if (state.flags & (BAD_S | BAD_T)) return NaN;
  const bool infinite = (row.divergence == Divergence::forward_kl && (state.flags & ALONE_S)) ||
                        (row.divergence == Divergence::reverse_kl && (state.flags & ALONE_T)) ||
                        (row.divergence == Divergence::mse && (state.flags & (ALONE_S | ALONE_T)));
  if (infinite) return INF;
  const Problem& p = row.problem;
  return p.soft_factor *
         with_rule(row.divergence, [&](auto rule) { return rule.value(state.r, shape(p)); });
}

bool gradient_is_nan(const Row& row, const State& state) {
  if (state.flags & BAD_S) return true;
  if (row.hard && !label_in_range(row)) return true;
  if (!row.soft) return false;
  if (state.flags & BAD_T) return true;
  if (row.divergence == Divergence::reverse_kl) return state.flags & ALONE_T;
  return row.divergence == Divergence::mse && (state.flags & (ALONE_S | ALONE_T));
}

// A row's gradient: constants first, then its segments in any order, then the label's own entry.
struct Gradient {
  const Row& row;
  const State& state;
  char* out;
  Dtype dtype;
  bool nan;
  double w_hard = 0, w_soft = 0;
  Constants<float> soft{};
  float hard_scale = 0, hard_offset = 0, label_value = 0;

  Gradient(const Row& row, const State& state) : row(row), state(state) {
    const Problem& p = row.problem;
    out = row_pointer(p.grad, row.n);
    dtype = p.grad.dtype;
    nan = gradient_is_nan(row, state);
    if (nan) return;
    const double scale = p.scale ? *p.scale : 1.0;
    if (row.hard) w_hard = scale * p.w_hard[row.n];
    if (row.soft) w_soft = scale * p.w_soft[row.n];
    if (row.soft) soft = soft_constants(row, state, w_soft);
    if (row.hard) {
      hard_scale = float(w_hard / state.r.d_1);
      if (p.label_smoothing > 0) hard_offset = float(-w_hard * p.label_smoothing / state.r.count);
      label_value = float(label_gradient());
    }
    if (std::isnan(w_hard + w_soft)) nan = true;
  }

  // The label's entry in full precision from its logits, before they may be overwritten; adding -w
  // to the stored, rounded value would lose everything where pi_y is close to 1.
  double label_gradient() const {
    const Problem& p = row.problem;
    const int64_t y = p.labels[row.n];
    const float s = read(row.s, row.s_dtype, y, row.table);
    const float t = row.soft || p.label_smoothing > 0
                        ? read(row_pointer(p.teacher, row.n), p.teacher.dtype, y, row.table)
                        : s;
    const bool absent = s == -INF && t == -INF;
    double g = w_hard * (exp2(std::max<double>((s - state.r.m_s) * row.k_1, LOWEST)) / state.r.d_1 -
                         (1 - p.label_smoothing));
    if (p.label_smoothing > 0 && !absent) g -= w_hard * p.label_smoothing / state.r.count;
    if (!row.soft || absent) return g;
    return g + with_rule(row.divergence, [&](auto rule) {
             const Constants<double> c =
                 rule.constants(state.r, w_soft * p.soft_factor / p.temperature, shape(p));
             if (!rule.SOFTMAX)
               return rule.gradient(double(s), double(t), 0.0, 0.0, double(row.k), c, 0.0);
             const double a = std::max<double>(s - state.r.m_s, LOWEST),
                          b = std::max<double>(t - state.r.m_t, LOWEST);
             return rule.gradient(a, b, exp2(a * row.k), exp2(b * row.k), double(row.k), c, 0.0);
           });
  }

  void segment(int64_t index, Scratch& scratch) const {
    for_blocks(row, index, [&](int64_t begin, int64_t end) {
      const int size = int(std::min<int64_t>(BLOCK, end - begin));
      char* to = out + begin * width(dtype);
      if (nan) {
        std::fill(scratch.g, scratch.g + size, NaN);
        row.table.narrow(dtype, scratch.g, to, size);
        return;
      }
      const Prepared block = prepare_again(row, state, begin, end, scratch);
      const bool direct = !block.copied && dtype == row.s_dtype;  // the kernel stores that type
      Block work = kernel_block(row, block, state.r.m_s, state.r.m_t);
      if (!block.copied && row.n + 1 < row.problem.N) prefetch_next_row(begin, work);
      void* to_kernel = direct ? static_cast<void*>(to) : scratch.g;
      row.table.gradient(block.load, row.divergence, row.hard_mode, work, soft, hard_scale,
                         hard_offset, to_kernel);
      if (direct) return;
      if (block.absent) clear_absent(begin, size, scratch);
      row.table.narrow(dtype, scratch.g, to, size);
    });
  }

  // This visit reads the row from the cache: meanwhile far memory can bring what the next row's
  // first visit will read.
  void prefetch_next_row(int64_t begin, Block& work) const {
    const Problem& p = row.problem;
    work.next_s = row_pointer(p.student, row.n + 1) + begin * width(row.s_dtype);
    if (row.soft) work.next_t = row_pointer(p.teacher, row.n + 1) + begin * width(row.t_dtype);
  }

  // An absent entry has no part in the smoothing's constant.
  void clear_absent(int64_t begin, int size, Scratch& scratch) const {
    for (int i = 0; i < size; ++i) {
      if (scratch.s[i] != LOWEST) continue;
      const bool alone =
          row.soft ? scratch.t[i] != LOWEST
                   : row.problem.label_smoothing > 0 &&
                         read(row_pointer(row.problem.teacher, row.n), row.problem.teacher.dtype,
                              begin + i, row.table) != float(-INF);
      if (!alone) scratch.g[i] = 0;
    }
  }

  void label() const {
    if (row.hard && !nan)
      row.table.narrow(dtype, &label_value, out + row.problem.labels[row.n] * width(dtype), 1);
  }
};

void zero_gradient(const Row& row) {
  const Rows& grad = row.problem.grad;
  std::memset(row_pointer(grad, row.n), 0, row.problem.V * width(grad.dtype));
}

void report(const Row& row, State& state) {
  const Problem& p = row.problem;
  p.hard[row.n] = row.hard ? float(hard_loss(row, state)) : 0.0f;
  p.soft[row.n] = row.soft ? float(soft_loss(row, state)) : 0.0f;
  float* stats = p.stats + row.n * STATS;
  save(state, stats);
  state = restore(
      stats);  // the gradient is then the same whether it is made here or later from what was saved
}

void report_skipped(const Row& row) {
  row.problem.hard[row.n] = row.problem.soft[row.n] = 0.0f;
  std::fill_n(row.problem.stats + row.n * STATS, STATS, 0.0f);
}

void whole_row_gradient(const Row& row, const State& state, Scratch& scratch) {
  const Gradient gradient(row, state);
  for (int64_t i = row.segments(); i-- > 0;)
    gradient.segment(i, scratch);  // backwards: the end of the row is still in cache
  gradient.label();
}

void whole_row(const Row& row, Scratch& scratch) {
  if (row.skipped()) {
    report_skipped(row);
    if (row.problem.grad.data) zero_gradient(row);
    return;
  }
  const State initial = initial_state(row, scratch);
  State state = first_visit(row, 0, initial, scratch);
  for (int64_t i = 1; i < row.segments(); ++i)
    merge(row, state, first_visit(row, i, initial, scratch));
  close(row, state);
  if (two_visits(row)) {
    for (int64_t i = 0; i < row.segments(); ++i) {
      double x, y;
      second_visit(row, state, i, scratch, &x, &y);
      state.r.x += x;
      state.r.y += y;
    }
  }
  report(row, state);
  if (row.problem.grad.data) whole_row_gradient(row, state, scratch);
}

template <class Body>
void split(const Parallel& parallel, int64_t n, Body body) {
  parallel.split(
      n,
      [](void* context, int64_t begin, int64_t end) {
        Scratch scratch;
        Body& body = *static_cast<Body*>(context);
        for (int64_t i = begin; i < end; ++i) body(i, scratch);
      },
      &body);
}

// Few rows: all threads on the segments of all rows, one kind of visit after the other.
struct BySegments {
  const Problem& problem;
  const Parallel& parallel;
  std::vector<Row> rows;
  std::vector<State> states;  // (N)
  int64_t segments;

  BySegments(const Problem& problem, const Parallel& parallel)
      : problem(problem), parallel(parallel) {
    for (int64_t n = 0; n < problem.N; ++n) rows.emplace_back(problem, kernels(), n);
    states.resize(problem.N);
    segments = rows.front().segments();
  }

  template <class Body>
  void for_segments(Body body) {
    split(parallel, problem.N * segments, [&](int64_t i, Scratch& scratch) {
      if (!rows[i / segments].skipped()) body(i / segments, i % segments, scratch);
    });
  }

  void forward() {
    std::vector<State> parts(problem.N * segments);
    split(parallel, problem.N, [&](int64_t n, Scratch& scratch) {
      if (!rows[n].skipped()) states[n] = initial_state(rows[n], scratch);
    });
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      parts[n * segments + i] = first_visit(rows[n], i, states[n], scratch);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      states[n] = parts[n * segments];
      for (int64_t i = 1; i < segments; ++i) merge(rows[n], states[n], parts[n * segments + i]);
      close(rows[n], states[n]);
    }
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) {
      RowSums<double>& r = parts[n * segments + i].r;
      if (two_visits(rows[n])) second_visit(rows[n], states[n], i, scratch, &r.x, &r.y);
    });
    for (int64_t n = 0; n < problem.N; ++n) {
      if (rows[n].skipped()) {
        report_skipped(rows[n]);
        continue;
      }
      for (int64_t i = 0; i < segments; ++i) {
        states[n].r.x += parts[n * segments + i].r.x;
        states[n].r.y += parts[n * segments + i].r.y;
      }
      report(rows[n], states[n]);
    }
  }

  void backward() {
    std::vector<Gradient> gradients;
    for (int64_t n = 0; n < problem.N; ++n) gradients.emplace_back(rows[n], states[n]);
    for_segments([&](int64_t n, int64_t i, Scratch& scratch) { gradients[n].segment(i, scratch); });
    for (int64_t n = 0; n < problem.N; ++n)
      rows[n].skipped() ? zero_gradient(rows[n]) : gradients[n].label();
  }
};

bool few_rows(const Problem& p, const Parallel& parallel) {
  return parallel.threads > 1 && p.N < 4 * int64_t(parallel.threads) && p.V > SEGMENT;
}

}  // namespace

void rows_forward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    work.forward();
    if (problem.grad.data) work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N,
        [&](int64_t n, Scratch& scratch) { whole_row(Row(problem, table, n), scratch); });
}

void rows_backward(const Problem& problem, const Parallel& parallel) {
  if (problem.N == 0) return;
  if (few_rows(problem, parallel)) {
    BySegments work(problem, parallel);
    for (int64_t n = 0; n < problem.N; ++n) work.states[n] = restore(problem.stats + n * STATS);
    work.backward();
    return;
  }
  const Kernels& table = kernels();
  split(parallel, problem.N, [&](int64_t n, Scratch& scratch) {
    const Row row(problem, table, n);
    row.skipped() ? zero_gradient(row)
                  : whole_row_gradient(row, restore(problem.stats + n * STATS), scratch);
  });
}

void scale_row(const Rows& grad, int64_t n, int64_t V, float factor) {
  kernels().scale(grad.dtype, row_pointer(grad, n), V, factor);
}

}  // namespace fused_kd
