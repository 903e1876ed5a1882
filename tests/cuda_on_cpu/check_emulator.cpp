// The emulator's own check: three correct kernels, and every kind of mistake planted into them.
//     check_emulator CASE [SEEDS]      CASE: none, or the name of a bug
// Exit status 0: every result was right. 1: a wrong one. Anything else: the emulator or a sanitizer
// stopped it.
#include "cuda_on_cpu.h"

#include <stdio.h>

#include <memory>
#include <string>
#include <vector>

using namespace fused_kd;

// clang-format off
#define BUGS(X)                                                                                \
  X(none) X(missing_barrier) X(missing_second_barrier) X(read_past_row) X(shared_overrun)      \
  X(shared_read_overrun) X(divergent_barrier) X(two_barriers) X(early_return)                  \
  X(divergent_shuffle) X(misaligned_load) X(divergent_cluster_arrive) X(push_at_the_end)       \
  X(mail_never_waited) X(mail_read_before_wait) X(read_before_wait) X(wrong_parity)            \
  X(expect_too_much) X(expect_too_little) X(expect_twice) X(copy_past_shared) X(copy_odd_size) \
  X(copy_misaligned) X(copy_past_row) X(missing_init) X(missing_init_fence) X(never_waited)    \
  X(barrier_overwritten) X(push_misaligned) X(wait_for_too_many) X(block_index_as_ticket)      \
  X(arrive_before_store) X(missing_barrier_before_arrive) X(stack_overflow)                    \
  X(missing_cluster_wait) X(missing_cluster_arrive)
// clang-format on
#define AS_ENUM(name) name,
enum class Bug { BUGS(AS_ENUM) };
#define AS_STRING(name) #name,
const char* const NAMES[] = {BUGS(AS_STRING)};

__device__ __forceinline__ float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

__device__ __forceinline__ float sum4(Bits16 bits) {
  float x[4];
  memcpy(x, &bits, sizeof x);
  return (x[0] + x[1]) + (x[2] + x[3]);
}

struct RowParams {
  const float* rows;  // (N, V), V a multiple of 4
  float* sums;        // (N), the row's sum minus that of the row before
  int N, V;
  Bug bug;
};

__device__ int deep(volatile int* depth) {
  volatile char bytes[4096];
  bytes[0] = char(*depth);
  --*depth;
  return *depth > 0 ? deep(depth) + bytes[0] : bytes[0];
}

// A block sums several rows, one after another: warp shuffles, then one float per warp in shared
// memory, used again for the next row.
__global__ void __launch_bounds__(128) sum_rows(RowParams p) {
  float* partial = reinterpret_cast<float*>(dynamic_shared());
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int n = int(blockIdx.x); n < p.N; n += int(gridDim.x)) {
    const float* row = p.rows + int64_t(n) * p.V + (p.bug == Bug::misaligned_load);
    const int end = p.bug == Bug::read_past_row && n == p.N - 1 ? p.V + 4 : p.V;
    float x = 0;
    for (int v = int(threadIdx.x) * 4; v < end; v += int(blockDim.x) * 4)
      x += sum4(load16(row + v));
    if (p.bug == Bug::early_return && threadIdx.x == 70) return;
    if (p.bug == Bug::divergent_shuffle) {
      if (threadIdx.x % 32 < 16) x += shuffle_xor(x, 8);
      block_sync();
    }
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[p.bug == Bug::shared_overrun ? warp + 1 : warp] = x;
    if (p.bug == Bug::divergent_barrier && warp == 1) block_sync();
    if (p.bug == Bug::two_barriers && warp == 0) {
      block_sync();
    } else if (p.bug != Bug::missing_barrier) {
      block_sync();
    }
    float sum = 0;
    for (unsigned i = 0; i < warps; ++i) sum += partial[i];
    if (p.bug == Bug::shared_read_overrun) sum += partial[warps] > 1e30f;
    if (p.bug != Bug::missing_second_barrier) block_sync();
    volatile int depth = 200;
    if (p.bug == Bug::stack_overflow) deep(&depth);
    if (threadIdx.x == blockDim.x - 1) p.sums[n] = sum;
  }
}

struct ClusterParams {
  const float* row;  // (blocks of the cluster, 2, SLICE) for each cluster
  float* sums;       // one per cluster, from its last block
  Bug bug;
};
constexpr uint32_t SLICE = 256;

// A cluster sums a row that it holds in its shared memory, two slices per block; each fetches both,
// and then the first once more, over itself. Each sends its sum to all.
__global__ void cluster_sum(const __grid_constant__ ClusterParams p) {
  unsigned char* shared = dynamic_shared();
  auto* barriers = reinterpret_cast<uint64_t*>(shared);    // 2, and the mail's
  float* partial = reinterpret_cast<float*>(shared + 32);  // one per warp
  auto* mail = reinterpret_cast<Bits16*>(shared + 64);     // one per block
  float* slices = reinterpret_cast<float*>(shared + 128);  // (2, SLICE)
  const uint32_t blocks = cluster_blocks(), rank = cluster_rank();
  const float* mine = p.row + int64_t(blockIdx.x) * 2 * SLICE;
  const bool leads = threadIdx.x == 0;
  const uint32_t bytes = SLICE * 4;
  if (leads) {
    if (p.bug != Bug::missing_init) barrier_init(&barriers[0]);
    barrier_init(&barriers[1]);
    barrier_init(&barriers[2]);
    if (p.bug != Bug::missing_init_fence) barrier_init_fence();
    uint32_t expected = bytes;
    if (p.bug == Bug::expect_too_much) expected += 16;
    if (p.bug == Bug::expect_too_little) expected -= 16;
    barrier_expect(&barriers[0], expected);
    if (p.bug == Bug::expect_twice) barrier_expect(&barriers[0], expected);
    const bool last = blockIdx.x + 1 == gridDim.x;
    bulk_copy(p.bug == Bug::copy_misaligned ? slices + 1 : slices, mine,
              p.bug == Bug::copy_odd_size ? bytes - 8 : bytes, &barriers[0]);
    bulk_copy(slices + SLICE, mine + SLICE, bytes / 2, &barriers[1]);
    const uint32_t half = SLICE + SLICE / 2;
    bulk_copy(slices + half + (p.bug == Bug::copy_past_shared ? 4 : 0),
              mine + half + (p.bug == Bug::copy_past_row && last ? 4 : 0), bytes / 2, &barriers[1]);
    barrier_expect(&barriers[1], bytes);
    barrier_expect(&barriers[2], blocks * sizeof *mail);
    if (p.bug == Bug::barrier_overwritten) partial[-8] = 1;
  }
  block_sync();
  if (p.bug == Bug::divergent_cluster_arrive && rank == 1 && leads) block_sync();
  if (p.bug != Bug::missing_cluster_arrive) cluster_arrive();
  if (p.bug != Bug::read_before_wait && p.bug != Bug::never_waited) barrier_wait(&barriers[0], 0);
  float x = 0;
  const int rounds = p.bug == Bug::never_waited ? 0 : 2;
  for (int round = 0; round < rounds; ++round) {
    if (round == 1) barrier_wait(&barriers[1], p.bug == Bug::wrong_parity ? 1 : 0);
    const float* slice = slices + round * SLICE;
    for (uint32_t v = threadIdx.x * 4; v < SLICE; v += blockDim.x * 4) x += sum4(load16(slice + v));
  }
  if (p.bug == Bug::never_waited) return cluster_wait();
  if (p.bug == Bug::read_before_wait) barrier_wait(&barriers[0], 0);
  block_sync();
  if (leads) {
    barrier_expect(&barriers[0], bytes);
    bulk_copy(slices, mine, bytes, &barriers[0]);
  }
  barrier_wait(&barriers[0], 1);
  x += slices[threadIdx.x] - mine[threadIdx.x];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  block_sync();
  if (p.bug != Bug::missing_cluster_wait) cluster_wait();
  float own = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) own += partial[i];
  const auto send_to = [&](uint32_t peer) {
    Bits16 bits = {};
    memcpy(&bits, &own, sizeof own);
    push(reinterpret_cast<char*>(mail + rank) + (p.bug == Bug::push_misaligned ? 4 : 0), bits,
         &barriers[2], peer);
  };
  for (uint32_t peer = 0; peer < blocks && leads; ++peer) send_to(peer);
  if (p.bug == Bug::mail_never_waited) return;
  if (p.bug != Bug::mail_read_before_wait) barrier_wait_for_peers(&barriers[2], 0);
  float sum = 0;
  for (uint32_t i = 0; i < blocks; ++i) {
    float of_block;
    memcpy(&of_block, mail + i, sizeof of_block);
    sum += of_block;
  }
  if (p.bug == Bug::mail_read_before_wait) barrier_wait_for_peers(&barriers[2], 0);
  if (p.bug == Bug::push_at_the_end && leads) send_to((rank + 1) % blocks);
  if (rank + 1 == blocks && leads) p.sums[blockIdx.x / blocks] = sum;
}

struct TicketParams {
  const float* row;    // (groups, W, blockDim)
  float* partial;      // (groups, W)
  float* sums;         // (groups, W)
  uint32_t* tickets;   // 1 zero
  uint32_t* counters;  // (groups) zeros
  int W;
  Bug bug;
};

// W blocks sum a row together through global memory; all get the sum.
__global__ void ticket_sum(TicketParams p) {
  auto* ticket = reinterpret_cast<uint32_t*>(dynamic_shared());
  float* warps = reinterpret_cast<float*>(dynamic_shared() + 16);
  if (threadIdx.x == 0) *ticket = take_ticket(p.tickets);
  block_sync();
  const uint32_t id = p.bug == Bug::block_index_as_ticket ? blockIdx.x : *ticket;
  const uint32_t group = id / uint32_t(p.W);
  const float x = warp_sum(p.row[int64_t(id) * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  block_sync();
  if (p.bug == Bug::arrive_before_store && threadIdx.x == 0) arrive(&p.counters[group]);
  if (threadIdx.x == 32) p.partial[id] = warps[0] + warps[1];
  if (p.bug != Bug::missing_barrier_before_arrive) block_sync();
  if (threadIdx.x == 0) {
    if (p.bug != Bug::arrive_before_store) arrive(&p.counters[group]);
    const bool one_more = p.bug == Bug::wait_for_too_many;
    wait_until(&p.counters[group], uint32_t(p.W) + one_more);
  }
  block_sync();
  float sum = 0;
  for (int i = 0; i < p.W; ++i) sum += p.partial[group * uint32_t(p.W) + uint32_t(i)];
  if (threadIdx.x == 0) p.sums[id] = sum;
}

// Small whole numbers, so that sums are exact in any order.
std::vector<float> numbers(size_t count) {
  std::vector<float> x(count);
  uint32_t word = 1;
  for (float& value : x) word = word * 1664525 + 1013904223, value = float(int(word >> 28) - 8);
  return x;
}

// On the heap, aligned as on a GPU, and of exact size.
struct Array {
  explicit Array(const std::vector<float>& values) : size(values.size()) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, size * 4) != 0) abort();
    data.reset(static_cast<float*>(p));
    memcpy(p, values.data(), size * 4);
  }
  struct Free {
    void operator()(float* p) const { free(p); }
  };
  size_t size;
  std::unique_ptr<float, Free> data;
};

int wrong = 0;

void expect(const char* what, size_t i, float got, double want) {
  if (double(got) != want && wrong++ < 5) printf("%s %zu: got %g, want %g\n", what, i, got, want);
}

double sum(const float* p, size_t count) {
  double x = 0;
  for (size_t i = 0; i < count; ++i) x += p[i];
  return x;
}

void check_rows(Bug bug) {
  const int N = 10, V = 260;
  const Array rows(numbers(size_t(N * V))), sums(std::vector<float>(N, NAN));
  const LaunchShape shape{3, 128, 16, 1, 1};
  launch_kernel(sum_rows, shape, nullptr, RowParams{rows.data.get(), sums.data.get(), N, V, bug});
  for (size_t n = 0; n < N; ++n) {
    expect("row", n, sums.data.get()[n], sum(rows.data.get() + n * V, V));
  }
}

void check_clusters(Bug bug) {
  const size_t clusters = 5, blocks = 4, length = blocks * 2 * SLICE;
  const Array row(numbers(clusters * length)), sums(std::vector<float>(clusters, NAN));
  const LaunchShape shape{int64_t(clusters * blocks), 64, 128 + 2 * SLICE * 4, int(blocks), 1};
  launch_kernel(cluster_sum, shape, nullptr, ClusterParams{row.data.get(), sums.data.get(), bug});
  for (size_t i = 0; i < clusters; ++i) {
    expect("cluster", i, sums.data.get()[i], sum(row.data.get() + i * length, length));
  }
}

void check_tickets(Bug bug) {
  const size_t groups = 7, W = 3, threads = 64;
  const Array row(numbers(groups * W * threads));
  const Array partial(std::vector<float>(groups * W, NAN)),
      sums(std::vector<float>(groups * W, NAN));
  std::vector<uint32_t> tickets(1), counters(groups);
  const LaunchShape shape{int64_t(groups * W), int(threads), 24, 1, int(W)};
  launch_kernel(ticket_sum, shape, nullptr,
                TicketParams{row.data.get(), partial.data.get(), sums.data.get(), tickets.data(),
                             counters.data(), int(W), bug});
  for (size_t i = 0; i < groups * W; ++i) {
    const float* mine = row.data.get() + i / W * W * threads;
    expect("group", i, sums.data.get()[i], sum(mine, W * threads));
  }
}

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "none";
  const int seeds = count > 2 ? atoi(arguments[2]) : 24;
  size_t i = 0;
  while (i < sizeof NAMES / sizeof *NAMES && NAMES[i] != name) ++i;
  if (i == sizeof NAMES / sizeof *NAMES) return printf("no case %s\n", name.c_str()), 2;
  for (int seed = 0; seed < seeds; ++seed) {
    emulator_seed(uint64_t(seed));
    check_rows(Bug(i));
    check_clusters(Bug(i));
    check_tickets(Bug(i));
  }
  printf("%d wrong\n", wrong);
  return wrong ? 1 : 0;
}
