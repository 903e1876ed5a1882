// Selects the kernel and the number of blocks of a row, by V and the types alone and never by N, so
// that the same row gives the same bits in any batch.
#include "launch.h"

#include "instances.h"

namespace fused_kd {

namespace {

constexpr int64_t MAX_GRID = (int64_t(1) << 31) - 1;

int groups_of(int64_t V) { return static_cast<int>((V + GROUP - 1) / GROUP); }

Divergence divergence_of(const Problem& p) { return p.w_soft ? p.divergence : Divergence::none; }

int bytes_of_group(const Problem& p) {
  const int teacher = p.w_soft && !p.has_classes ? width(p.teacher.dtype) : 0;
  return GROUP * (width(p.student.dtype) + teacher);
}

struct Plan {
  Kernel kernel;
  int parts, slice;  // blocks of a row, groups in each
  bool has_classes;

  Plan(Kernel kernel, const Problem& p, int parts)
      : kernel(kernel), parts(parts), has_classes(p.has_classes) {
    slice = (groups_of(p.V) + parts - 1) / parts;
    if (kernel == Kernel::measure && has_classes && slice > MEASURED_SLICE) slice = MEASURED_SLICE;
  }
  int slices_end(int group_bytes) const {
    const int head = kernel == Kernel::measure ? MEASURED_BYTES : static_cast<int>(sizeof(Shared));
    return head + (has_classes ? mask_bytes(slice) : 0) +
           (kernel == Kernel::cluster ? slice * group_bytes : 0);
  }
  int shared_bytes(int group_bytes) const {
    const bool hand_over = kernel == Kernel::cluster && parts > 1;
    return slices_end(group_bytes) + (hand_over ? parts * handed_bytes(records()) : 0);
  }
  // Returns the number of records of a block in the first round.
  int records() const { return has_classes ? 2 : 1; }
};

Plan plan_general(const Problem& p) {
  const int64_t bytes = int64_t(groups_of(p.V)) * bytes_of_group(p);
  const int64_t parts = (bytes + GLOBAL_SLICE_BYTES - 1) / GLOBAL_SLICE_BYTES;
  return Plan(Kernel::general, p, parts < MAX_PARTS ? static_cast<int>(parts) : MAX_PARTS);
}

// Returns the smallest cluster of which three blocks fit on a multiprocessor, else the largest if
// two fit. A multiprocessor with one block is idle while its row is loaded and its gradient stored.
Plan plan_rows(const Problem& p, const Device& device) {
  const int group_bytes = bytes_of_group(p);
  for (int blocks = 1; blocks <= device.cluster; blocks *= 2) {
    const Plan plan(Kernel::cluster, p, blocks);
    const int limit = blocks < device.cluster ? device.bytes_of_three : device.bytes_of_two;
    if (plan.slice <= CHUNK * MAX_CHUNKS && plan.shared_bytes(group_bytes) <= limit) return plan;
  }
  return plan_general(p);
}

Params params_of(const Problem& p, const Plan& plan) {
  const bool softened = with_rule(divergence_of(p), [](auto rule) { return rule.SOFTMAX; });
  Params q = {};
  q.entries = static_cast<int>(p.V);
  q.student = p.student;
  q.teacher = p.teacher;
  q.grad = p.grad;
  q.labels = p.labels;
  q.w_hard = p.w_hard;
  q.w_soft = p.w_soft;
  q.scale = p.scale;
  Options& o = q.options;
  // softmaxes use exponents of 2, mse the logits
  o.rule = {static_cast<float>(softened ? LOG2E : p.temperature), static_cast<float>(p.beta)};
  o.k_1 = static_cast<float>(LOG2E);
  o.k = softened ? static_cast<float>(LOG2E / p.temperature) : o.k_1;
  // the rounding error of a reference is then below 1/16; a row shorter than a group gains nothing
  constexpr double LARGEST_EXPONENT = 1 << 20;
  o.moderate =
      p.V < GROUP ? 0.0f : static_cast<float>(LARGEST_EXPONENT / (o.k > o.k_1 ? o.k : o.k_1));
  o.hard = !p.w_hard                         ? Hard::off
           : !softened || p.temperature == 1 ? Hard::power1
           : p.temperature == 2              ? Hard::power2
                                             : Hard::separate;
  o.smoothing = p.w_hard && p.label_smoothing > 0;
  q.temperature = static_cast<float>(p.temperature);
  q.soft_factor = static_cast<float>(p.soft_factor);
  q.label_smoothing = static_cast<float>(p.label_smoothing);
  q.hard = p.hard;
  q.soft = p.soft;
  q.stats = p.stats;
  q.parts = plan.parts;
  while (1 << q.parts_log2 < plan.parts) ++q.parts_log2;
  q.slice = plan.slice;
  q.has_classes = p.has_classes;
  q.token_ids = p.token_ids;
  q.K = static_cast<int>(p.K);
  q.divergence = divergence_of(p);
  q.rounds = with_rule(divergence_of(p), [](auto rule) { return rule.TWO_PASSES ? 2 : 1; });
  return q;
}

// The number of blocks: one for each part of a row, or fewer that stride over the parts.
struct Blocks {
  int64_t most = MAX_GRID;
  bool wait = false;  // those of a row wait for each other
};

// Launches all rows; more than one launch is needed only beyond the limit of a grid, 2^31 - 1
// blocks.
int launch(const Plan& plan, Divergence divergence, int group_bytes, Blocks blocks, int64_t N,
           void* stream, Params q) {
  const auto typed = q.student.dtype == Dtype::f32    ? launch_f32
                     : q.student.dtype == Dtype::bf16 ? launch_bf16
                                                      : launch_f16;
  q.slices_end = plan.slices_end(group_bytes);
  const int64_t rows = MAX_GRID / plan.parts;
  for (q.first_row = 0; q.first_row < N; q.first_row += rows) {
    const int64_t count = N - q.first_row < rows ? N - q.first_row : rows;
    q.units = static_cast<uint32_t>(count * plan.parts);
    const LaunchShape shape = {
        q.units < blocks.most ? q.units : blocks.most, THREADS, plan.shared_bytes(group_bytes),
        plan.kernel == Kernel::cluster ? plan.parts : 1, blocks.wait ? plan.parts : 1};
    const int error = typed(plan.kernel, divergence, shape, stream, q);
    if (error) return error;
  }
  return 0;
}

int launch_from_statistics(const Problem& p, const Device& device, bool unless_exact,
                           void* stream) {
  const Plan plan = plan_general(p);
  Params q = params_of(p, plan);
  q.from_stats = true;
  q.unless_exact = unless_exact;
  const Blocks blocks = {int64_t(device.multiprocessors) * GENERAL_BLOCKS};
  return launch(plan, divergence_of(p), bytes_of_group(p), blocks, p.N, stream, q);
}

// Multiplies the gradient by *p.scale; unless_exact: only if the product is exact.
int launch_multiply(const Problem& p, const Device& device, bool unless_exact, void* stream) {
  const Plan plan(Kernel::scale, p, plan_general(p).parts);
  Params q = params_of(p, plan);
  q.unless_exact = unless_exact;
  q.student = p.grad;  // its type selects the kernel
  const Blocks blocks = {int64_t(device.multiprocessors) * SCALE_BLOCKS};
  return launch(plan, Divergence::none, 0, blocks, p.N, stream, q);
}

// The layout of the device memory in which the blocks of a row exchange records.
struct WorkspaceLayout {
  int ring;
  int64_t counters, bytes;  // bytes of the counters, which are zeroed, and of everything

  WorkspaceLayout(int64_t N, const Plan& plan) {
    const int64_t rows = plan.parts < RING_RECORDS ? RING_RECORDS / plan.parts : 1;
    ring = static_cast<int>(N < rows ? N : rows);
    counters = ((1 + 2 * N) * 4 + 15) / 16 * 16;
    const int64_t records = int64_t(ring) * plan.parts * (plan.records() + 1);
    bytes = counters + records * static_cast<int64_t>(sizeof(Record));
    if (plan.kernel == Kernel::cluster || plan.parts == 1) bytes = 0;
  }
};

}  // namespace

int64_t workspace_bytes(const Problem& p, const Device& device) {
  return WorkspaceLayout(p.N, plan_rows(p, device)).bytes;
}

int launch_rows(const Problem& p, const Device& device, void* workspace, void* stream) {
  const Plan plan = plan_rows(p, device);
  const WorkspaceLayout layout(p.N, plan);
  Params q = params_of(p, plan);
  if (layout.bytes > 0) {
    if (plan.parts > device.multiprocessors * GENERAL_BLOCKS) return TOO_FEW_MULTIPROCESSORS;
    q.tickets = static_cast<uint32_t*>(workspace);
    q.arrived = q.tickets + 1;
    q.finished = q.arrived + p.N;
    q.partials = reinterpret_cast<Record*>(static_cast<char*>(workspace) + layout.counters);
    q.ring = layout.ring;
    const int error = clear_memory(workspace, layout.counters, stream);
    if (error) return error;
  }
  return launch(plan, divergence_of(p), bytes_of_group(p), {MAX_GRID, true}, p.N, stream, q);
}

int launch_gradient(const Problem& p, const Device& device, void* stream) {
  return launch_from_statistics(p, device, false, stream);
}

int launch_measure(const Problem& p, float* columns, int64_t* largest, void* stream) {
  const Plan plan(Kernel::measure, p, 1);
  Params q = params_of(p, plan);
  q.columns = columns;
  q.largest = largest;
  return launch(plan, divergence_of(p), 0, {}, p.N, stream, q);
}

int launch_scale(const Rows& grad, int64_t N, int64_t V, const float* scale, const Device& device,
                 void* stream) {
  Problem p = {};
  p.N = N;
  p.V = V;
  p.student = p.teacher = p.grad = grad;
  p.scale = scale;
  return launch_multiply(p, device, false, stream);
}

int launch_rescale(const Problem& p, const Device& device, void* stream) {
  if (p.grad.dtype == Dtype::f32) return launch_multiply(p, device, false, stream);
  const int error = launch_multiply(p, device, true, stream);
  return error ? error : launch_from_statistics(p, device, true, stream);
}

}  // namespace fused_kd
