// The CUDA backend's launchers over both kernels, every divergence and a top-k teacher, in place and
// out, for the sanitizers: built with ThreadSanitizer it shows two accesses that nothing orders, with
// AddressSanitizer and UBSan every access outside a tensor.
//     check_races SEEDS [PART]      PART: general or cluster; both without
// Exit status 0: the same bits in any order of threads and blocks, and no NaN in
// rows that have a value. Buffers have their exact size; gaps between strided rows hold NaN and stay untouched.
//
// -DONLY_TVD leaves one instance of either kernel, so that a changed copy compiles in seconds. It has
// every barrier: two passes for statistics. -DONLY_CLASSES: likewise for a top-k teacher.
#include <cuda_on_cpu.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "instances.h"
#include "launch.h"

using namespace fused_kd;

static constexpr float NaN = NAN;
static int failures = 0, launches = 0;

static void must(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) printf("FAILED %s\n", what.c_str());
}

namespace fused_kd {

// float16 differs in conversions alone.
int launch_f16(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -1; }
#if defined(ONLY_TVD) || defined(ONLY_CLASSES)
int launch_bf16(Kernel kernel, Divergence, const LaunchShape& shape, void* stream,
                const Params& params) {
#ifdef ONLY_TVD
  const auto general = rows_general<Divergence::tvd, Dtype::bf16, true>;
  const auto cluster = rows_cluster<Divergence::tvd, Dtype::bf16, true>;
#else
  const auto general = rows_general_classes<Dtype::bf16>;
  const auto cluster = rows_cluster_classes<Dtype::bf16>;
  if (kernel == Kernel::measure)
    return launch_kernel(measure_support<Dtype::bf16>, shape, stream, params);
#endif
  return kernel == Kernel::scale
             ? launch_kernel(scale_rows<Dtype::bf16>, shape, stream, params)
             : launch_kernel(kernel == Kernel::general ? general : cluster, shape, stream, params);
}
int launch_f32(Kernel, Divergence, const LaunchShape&, void*, const Params&) { return -1; }
#endif

}  // namespace fused_kd

// A read of 32 bytes around 16 that are wanted also touches what the next thread writes in place;
// what is not wanted is shifted out, regardless of its value. Other reads look at the same elements.
extern "C" const char* __tsan_default_suppressions() { return "race:load16_shifted\n"; }

// ------------------------------------------------------------------------------------- problems

struct Case {
  Divergence divergence;
  Dtype student, teacher;
  int64_t V;
  int offset;  // of every tensor from an aligned address, in elements; 0: every row is aligned
  int capability;
  double temperature;
  bool smoothing;
  int K = -1;  // of a top-k teacher; -1: the teacher's row has V entries

  std::string name() const {
    char text[120];
    snprintf(text, sizeof text, "divergence %d, dtypes %d %d, V %d, offset %d, sm_%d, T %g, K %d",
             int(divergence), int(student), int(teacher), int(V), offset, capability, temperature,
             K);
    return text;
  }
};

// What every problem has: rows of both terms, of one, without a label that exists, off, with
// infinities; more of them than records for their blocks.
constexpr int64_t N = 7, INNER = 2;
enum { BOTH, HARD_ALONE, NO_LABEL, OFF, ABSENT };

// Rows of V elements in groups of INNER, gaps between them, nothing behind the last.
struct Matrix {
  Rows rows;
  int64_t V, elements;
  std::unique_ptr<char[]> memory;

  Matrix(Dtype dtype, int64_t V, int offset) : V(V) {
    const int64_t stride = offset ? V + 3 : V / 8 * 8 + 8;
    const int64_t outer = INNER * stride + (offset ? 5 : 8);
    elements = (N - 1) / INNER * outer + (N - 1) % INNER * stride + V;
    memory.reset(new char[(elements + offset) * width(dtype)]);
    rows = {memory.get() + offset * width(dtype), dtype, INNER, outer, stride};
    for (int64_t i = 0; i < elements; ++i) set(i, NaN);
  }
  int64_t at(int64_t n, int64_t v) const {
    return n / INNER * rows.outer_stride + n % INNER * rows.inner_stride + v;
  }
  char* address(int64_t i) const { return static_cast<char*>(rows.data) + i * width(rows.dtype); }
  void set(int64_t i, float x) {
    const uint32_t word = rows.dtype == Dtype::f32 ? same_bits<uint32_t>(x) : pack_bf16(x, x);
    memcpy(address(i), &word, width(rows.dtype));
  }
  void copy(const Matrix& other) { memcpy(address(0), other.address(0), bytes()); }
  size_t bytes() const { return elements * width(rows.dtype); }
  bool is_nan(int64_t i) const {
    uint32_t word = 0;
    memcpy(&word, address(i), width(rows.dtype));
    const float x = rows.dtype == Dtype::f32 ? same_bits<float>(word) : from_bf16(word);
    return x != x;
  }
  // NaN in the gaps, and in no row but NO_LABEL's; that one is all NaN if it has a hard term.
  void check(const std::string& what) const {
    std::vector<char> inside(elements, 0);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = 0; v < V; ++v) inside[at(n, v)] = n == NO_LABEL ? 2 : 1;
    for (int64_t i = 0; i < elements; ++i)
      if (is_nan(i) != (inside[i] != 1)) return must(false, what + ": NaN, or none");
  }
};

template <class T>
std::unique_ptr<T[]> exactly(std::vector<T> values) {
  std::unique_ptr<T[]> memory(new T[values.size()]);
  std::copy(values.begin(), values.end(), memory.get());
  return memory;
}

struct Data {
  Case c;
  Matrix student, teacher, grad, inplace;
  std::unique_ptr<int64_t[]> labels;
  std::unique_ptr<int32_t[]> token_ids;
  std::unique_ptr<float[]> w_hard, w_soft, scale, hard, soft, stats;

  explicit Data(const Case& c)
      : c(c),
        student(c.student, c.V, c.offset),
        teacher(c.teacher, c.K < 0 ? c.V : c.K + 1, c.offset),
        grad(c.student, c.V, c.offset),
        inplace(c.student, c.V, c.offset),
        labels(exactly<int64_t>({c.V - 1, c.V / 2, c.V, 0, 0, 0, c.V - 1})),
        token_ids(exactly(tokens(c))),
        w_hard(exactly<float>({0.5f, 1, 1, 0, 0.25f, 1, 2})),
        w_soft(exactly<float>({0.5f, 0, 1, 0, 0.75f, 1, 2})),
        scale(exactly<float>({0.3f})),
        hard(exactly(std::vector<float>(N, NaN))),
        soft(exactly(std::vector<float>(N, NaN))),
        stats(exactly(std::vector<float>(N * STATS, NaN))) {
    uint32_t state = 1;
    auto random = [&] { return float(int((state = state * 1664525u + 1013904223u) >> 8)) * 6e-7f; };
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t v = 0; v < c.V; ++v) {
        const bool absent = n == ABSENT && v % 3 == 1;
        student.set(student.at(n, v), absent ? -INFINITY : random());
        if (v < teacher.V) teacher.set(teacher.at(n, v), absent && c.K < 0 ? -INFINITY : random());
      }
    }
    inplace.copy(student);
  }

  // Different ones in all blocks, and two that are none.
  static std::vector<int32_t> tokens(const Case& c) {
    std::vector<int32_t> ids(c.K > 0 ? N * c.K : 0);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int32_t(i % c.K * c.V / c.K);
    for (size_t i = 1; i < ids.size(); i += c.K) ids[i] = i % 2 ? -1 : int32_t(c.V);
    return ids;
  }

  Problem problem(const Matrix& from, const Matrix* to) const {
    Problem p = {};
    p.N = N;
    p.V = c.V;
    p.student = from.rows;
    p.teacher = teacher.rows;
    p.has_classes = c.K >= 0;
    p.K = c.K;
    p.token_ids = token_ids.get();
    if (to) p.grad = to->rows;
    p.labels = labels.get();
    p.w_hard = w_hard.get();
    if (c.divergence != Divergence::none) p.w_soft = w_soft.get();
    p.divergence = c.divergence;
    p.temperature = c.temperature;
    p.beta = 0.3;
    p.soft_factor = c.temperature * c.temperature;
    p.label_smoothing = c.smoothing ? 0.1 : 0.0;
    p.hard = hard.get();
    p.soft = soft.get();
    p.stats = stats.get();
    return p;
  }
};

// ------------------------------------------------------------------------------------- launches

static void launched(int error, const Data& data) {
  ++launches;
  must(error == 0, data.c.name() + ": a launch failed");
}

// Of a few multiprocessors, so that blocks stride over rows if they may.
static Device device_of(const Case& c) {
  return {8, 4096, 113 * 1024, c.capability >= 90 ? 16 : 0};
}

static void rows(const Data& data, const Problem& p) {
  const Device device = device_of(data.c);
  const auto workspace = exactly(std::vector<char>(workspace_bytes(p, device), char(0xff)));
  const bool wanted = workspace_bytes(p, device) > 0;
  launched(launch_rows(p, device, wanted ? workspace.get() : nullptr, nullptr), data);
}

// The bits of what kd_metrics needs, after a launch of the losses.
static std::string measures(const Data& data, const Problem& p) {
  const int number = p.has_classes ? SUPPORT_MEASURES : MEASURES, sides = p.has_classes ? 1 : 2;
  const auto columns = exactly(std::vector<float>(N * number, NaN));
  const auto largest = exactly(std::vector<int64_t>(N * sides, -1));
  launched(launch_measure(p, columns.get(), largest.get(), nullptr), data);
  for (int64_t n = 0; n < N; ++n) {
    const bool written = p.w_soft[n] != 0, first = columns[n * number] == columns[n * number];
    const bool inside = largest[n * sides] >= 0 && largest[n * sides] < p.V;
    must(first == (written && n != NO_LABEL), data.c.name() + ": the cross-entropy of a row");
    must(inside == written, data.c.name() + ": the largest entry of a row");
  }
  return std::string(reinterpret_cast<char*>(columns.get()), N * number * sizeof(float)) +
         std::string(reinterpret_cast<char*>(largest.get()), N * sides * sizeof(int64_t));
}

// All variants of a backward; a digest of the results.
static std::string results(const Case& c) {
  Data data(c);
  const Device device = device_of(c);
  std::string bits;
  auto take = [&](const Matrix& grad, const char* what) {
    grad.check(c.name() + ": " + what);
    bits.append(grad.address(0), grad.bytes());
  };
  rows(data, data.problem(data.student, nullptr));
  bits.append(reinterpret_cast<char*>(data.hard.get()), N * sizeof(float));
  bits.append(reinterpret_cast<char*>(data.soft.get()), N * sizeof(float));
  if (c.divergence == Divergence::forward_kl || c.K >= 0)
    bits += measures(data, data.problem(data.student, nullptr));
  rows(data, data.problem(data.student, &data.grad));
  take(data.grad, "rows");
  rows(data, data.problem(data.inplace, &data.inplace));
  take(data.inplace, "rows in place");
  must(!memcmp(data.grad.address(0), data.inplace.address(0), data.grad.bytes()),
       c.name() + ": in place gives other bits");
  Problem p = data.problem(data.student, &data.grad);
  p.scale = data.scale.get();
  launched(launch_rescale(p, device, nullptr),
           data);  // from the statistics, if it isn't float32
  take(data.grad, "rescale");
  launched(launch_gradient(data.problem(data.student, &data.grad), device, nullptr), data);
  take(data.grad, "gradient");
  launched(launch_scale(data.grad.rows, N, c.V, data.scale.get(), device, nullptr), data);
  take(data.grad, "scale");
  data.inplace.copy(data.student);
  launched(launch_gradient(data.problem(data.inplace, &data.inplace), device, nullptr), data);
  take(data.inplace, "gradient in place");
  return bits;
}

static std::vector<Case> dense_cases(int capability) {
#ifdef ONLY_TVD
  const int64_t V = 2400;  // five blocks, as float32 has for the other one
  const std::vector<Divergence> divergences = {Divergence::tvd};
  const std::vector<std::pair<Dtype, Dtype>> dtypes = {{Dtype::bf16, Dtype::bf16}};
#else
  const int64_t V = 1200;
  std::vector<Divergence> divergences;
  for (int d = 0; d <= NUMBER_OF_DIVERGENCES; ++d) divergences.push_back(Divergence(d));
  const std::vector<std::pair<Dtype, Dtype>> dtypes = {
      {Dtype::f32, Dtype::f32}, {Dtype::bf16, Dtype::bf16}, {Dtype::bf16, Dtype::f32}};
#endif
  std::vector<Case> result;
  for (const Divergence d : divergences) {
    for (const auto& [s, t] : dtypes) {
      // one element, a partial group, several blocks with shifted reads, or with bulk copies
      result.push_back({d, s, t, 1, 1, capability, 1, true});
      result.push_back({d, s, t, 15, 0, capability, 2, false});
      result.push_back({d, s, t, V + 3, 3, capability, 3.7, true});
      result.push_back({d, s, t, V, 0, capability, 1, false});
    }
    // slices of two chunks
    if (capability == 90 && (d == Divergence::tvd || d == Divergence::forward_kl))
      result.push_back({d, Dtype::bf16, Dtype::bf16, 16536, 0, capability, 2, false});
  }
  return result;
}

static std::vector<Case> cases_of_classes(int capability) {
  const Dtype s = Dtype::bf16, t = Dtype::f32;
  // one block; several, with two passes and more classes than threads; with shifted reads
  std::vector<Case> result = {{Divergence::jsd, s, t, 15, 0, capability, 2, true, 3},
                              {Divergence::tvd, s, t, 4800, 0, capability, 1, false, 150},
                              {Divergence::forward_kl, s, t, 4803, 3, capability, 3.7, true, 9}};
#ifndef ONLY_CLASSES
  result.push_back({Divergence::reverse_kl, t, t, 2400, 0, capability, 2, false, 9});
#endif
  return result;
}

static std::vector<Case> cases(int capability) {
#if defined(ONLY_TVD)
  return dense_cases(capability);
#elif defined(ONLY_CLASSES)
  return cases_of_classes(capability);
#else
  std::vector<Case> result = dense_cases(capability);
  for (const Case& c : cases_of_classes(capability)) result.push_back(c);
  return result;
#endif
}

int main(int count, char** arguments) {
  const int seeds = count > 1 ? atoi(arguments[1]) : 1;
  const std::string part = count > 2 ? arguments[2] : "";
  for (const int capability : {80, 90}) {
    if (!part.empty() && part != (capability == 80 ? "general" : "cluster")) continue;
    for (const Case& c : cases(capability)) {
      emulator_seed(0);
      const std::string first = results(c);
      for (int seed = 1; seed < seeds; ++seed) {
        emulator_seed(seed);
        must(results(c) == first, c.name() + ": the bits depend on the order");
      }
    }
  }
  printf("%d launches, %d failed\n", launches, failures);
  return failures || launches == 0;
}
