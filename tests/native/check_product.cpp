// Whole matrix products with the instruction sets named on the command line: every element type,
// layout and rounding against double arithmetic, the same bits for any number of regions.
//
// Buffers have their exact size, off any alignment: a sanitizer reports every access outside.
#include <random>
#include <stdexcept>
#include <thread>

#include "../../csrc/cpu/product.h"
#define FUSED_KD_ISA check_isa
#define FUSED_KD_LANES 4
#include "../../csrc/cpu/vec.h"
#include "check.h"

using namespace fused_kd;

// Several parts are computed by new threads, which have no tile registers; a single one by this
// thread, so that a configuration left by the previous product is noticed.
static void split_parts(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n == 1) return body(context, 0, 1);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context, i, i + 1);
  for (std::thread& thread : threads) thread.join();
}

static float rounded(float x, Dtype to) {
  if (to == Dtype::f16) return check_isa::half_to_float(check_isa::float_to_half(x));
  return to == Dtype::bf16 ? from_bits(uint32_t(to_bf16(x)) << 16) : x;
}

// A matrix along rows or columns, with a gap behind each, its values as stored.
struct Matrix {
  int64_t stride;
  bool by_rows;
  Dtype dtype;
  std::vector<float> values;  // (rows, columns)
  int64_t columns;
  std::unique_ptr<char[]> memory;

  Matrix(int64_t rows, int64_t columns, Dtype dtype, bool by_rows, std::mt19937& random)
      : by_rows(by_rows), dtype(dtype), values(rows * columns), columns(columns) {
    const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows;
    stride = length + 3;
    const int w = width(dtype);
    memory.reset(new char[((lines - 1) * stride + length + 1) * w]);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const float x = values[i * columns + j] = rounded(normal(random), dtype);
        const int64_t at = by_rows ? i * stride + j : j * stride + i;
        const uint16_t half = dtype == Dtype::f16 ? check_isa::float_to_half(x).raw : to_bf16(x);
        memcpy(memory.get() + (at + 1) * w,
               dtype == Dtype::f32 ? (const void*)&x : (const void*)&half, w);
      }
  }
  Operand operand() const {
    return {memory.get() + width(dtype), dtype, by_rows ? stride : 1, by_rows ? 1 : stride};
  }
  double at(int64_t i, int64_t j, Dtype round) const {
    return rounded(values[i * columns + j], round);
  }
};

struct Case {
  int64_t M, N, K;
  Dtype of_a, of_b, round_to;
  bool a_by_rows, b_by_rows, round_a, accumulate, bias;
};

static float element(const char* p, Dtype dtype) {
  uint32_t word = 0;
  memcpy(&word, p, width(dtype));
  if (dtype == Dtype::f16) return check_isa::half_to_float({uint16_t(word)});
  return from_bits(dtype == Dtype::bf16 ? word << 16 : word);
}

static std::vector<float> run(const Case& c, const Matrix& a, const Matrix& b, const float* bias,
                              int threads, Dtype dtype) {
  const int w = width(dtype);
  const int64_t size = (c.M - 1) * (c.N + 2) + c.N;
  const uint32_t one_half = dtype == Dtype::f32    ? 0x3f000000
                            : dtype == Dtype::bf16 ? 0x3f00
                                                   : 0x3800;
  const std::unique_ptr<char[]> memory(new char[(size + 1) * w]);
  char* const out = memory.get() + w;
  for (int64_t i = 0; i < size; ++i) memcpy(out + i * w, &one_half, w);
  Product p{};
  p.M = c.M;
  p.N = c.N;
  p.K = c.K;
  p.a = a.operand();
  p.b = b.operand();
  p.round_to = c.round_to;
  p.round_a = c.round_a;
  p.accumulate = c.accumulate;
  p.bias = c.bias ? bias : nullptr;
  p.c = out;
  p.c_dtype = dtype;
  p.c_stride = c.N + 2;
  multiply(p, {split_parts, threads});
  std::vector<float> values;
  for (int64_t i = 0; i < c.M; ++i)
    for (int64_t j = 0; j < c.N + (i + 1 < c.M ? 2 : 0); ++j) {
      const float x = element(out + (i * (c.N + 2) + j) * w, dtype);
      if (j < c.N)
        values.push_back(x);
      else
        expect(x == 0.5f, "written between the rows");
    }
  return values;
}

static void check(const Case& c, const std::string& isa, std::mt19937& random) {
  const Matrix a(c.M, c.K, c.of_a, c.a_by_rows, random);
  const Matrix b(c.K, c.N, c.of_b, c.b_by_rows, random);
  std::vector<float> bias(c.N);
  for (float& x : bias) x = float(random() % 100) / 7;
  const std::string name = isa + " " + std::to_string(c.M) + "x" + std::to_string(c.N) + "x" +
                           std::to_string(c.K) + " types " + std::to_string(int(c.of_a)) +
                           std::to_string(int(c.of_b)) + std::to_string(int(c.round_to));
  const std::vector<float> got = run(c, a, b, bias.data(), 1, Dtype::f32);
  const bool pairs = multiplies_pairs() && c.round_to == Dtype::bf16;
  const Dtype round_a = c.round_a || pairs ? c.round_to : Dtype::f32;
  for (int64_t i = 0; i < c.M; ++i)
    for (int64_t j = 0; j < c.N; ++j) {
      double want = c.accumulate ? 0.5 : c.bias ? bias[j] : 0, terms = fabs(want);
      for (int64_t k = 0; k < c.K; ++k) {
        const double term = a.at(i, k, round_a) * b.at(k, j, c.round_to);
        want += term;
        terms += fabs(term);
      }
      expect_near(got[i * c.N + j], want, double(c.K + 3) * 6e-8 * terms, name);
    }
  for (int threads : {2, 7}) {
    const std::vector<float> other = run(c, a, b, bias.data(), threads, Dtype::f32);
    expect(!memcmp(got.data(), other.data(), got.size() * 4), name + ": bits of several regions");
  }
  if (c.accumulate) return;
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    const std::vector<float> other = run(c, a, b, bias.data(), 2, dtype);
    for (size_t i = 0; i < got.size(); ++i)
      expect(other[i] == rounded(got[i], dtype), name + ": rounded", other[i],
             rounded(got[i], dtype));
  }
}

static void check_agreement(const std::string& isa) {
  expect(agree(product_kernels(), product_kernels()), isa + " agrees with itself");
  ProductKernels wrong = product_kernels();
  wrong.multiply = [](const Product& p, const Region& region, float* memory) {
    product_kernels().multiply(p, region, memory);
    static_cast<float*>(p.c)[p.N] += 1;
  };
  expect(!agree(wrong, product_kernels()), isa + ": a wrong product is noticed");
}

// Without permission amx is not chosen, and not listed as one that runs.
static int check_refusal() {
  amx_is_granted = false;
  choose_kernels("");
  expect(instruction_set() == std::string("avx512_bf16"), "the next one is chosen");
  int count;
  expect(!candidates(&count)[0].runs, "amx is listed as one that does not run");
  try {
    choose_kernels("amx");
    expect(false, "amx by name is an error");
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find("FUSED_KD_CPU=amx: ") == 0, error.what());
  }
  return finish();
}

int main(int argc, char** argv) {  // names of instruction sets, or "refusal"
  if (argc == 2 && argv[1] == std::string("refusal")) return check_refusal();
  const int64_t shapes[][3] = {{1, 1, 1},    {5, 7, 2},    {13, 33, 17}, {12, 32, 64},
                               {15, 50, 67}, {7, 35, 515}, {780, 9, 5},  {2, 1020, 3},
                               {50, 70, 67}, {34, 40, 545}};
  for (int isa = 1; isa < argc; ++isa) {
    choose_kernels(argv[isa]);
    check_agreement(argv[isa]);
    std::mt19937 random(isa);
    unsigned turn = 0;
    for (const auto& [M, N, K] : shapes)
      for (int type = 0; type < 27; ++type)
        for (int layout = 0; layout < 4; ++layout) {
          const int64_t size = M * N * K;  // of large products fewer types; every layout still
          if ((type + layout) % (size > 500000 ? 12 : size > 50000 ? 4 : 1)) continue;
          ++turn;
          check({M, N, K, Dtype(type % 3), Dtype(type / 3 % 3), Dtype(type / 9), layout % 2 == 0,
                 layout < 2, turn % 2 == 0, turn % 3 == 0, turn % 3 == 1},
                argv[isa], random);
        }
  }
  return finish();
}
