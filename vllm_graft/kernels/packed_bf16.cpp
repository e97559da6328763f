// Products of bf16 rows and a packed bf16 weight, by AVX-512's dot products of pairs.
//
// One to eight rows take the time of reading the weight once. A number of the result is one sum
// over K, cut into chunks that are added up in float32; its order does not follow from the rows
// around it.
//
// Experts have packed weights of one size, one behind the other, and rows sorted by expert.
//
// Legend: R rows, K inputs (even), M outputs of one of several weights. Packed, one weight behind
// the other: [panels, K / 2, PANEL, 2], M cut into panels of PANEL, the last one filled up with zeros.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;
using bf16 = uint16_t;

constexpr int PANEL = 32;           // outputs of one pass: two registers of sums for each row
constexpr int ROWS = 12;            // rows of one pass: 24 of the 32 registers hold sums
constexpr int64_t AHEAD = 64;       // pairs between what is multiplied and what is fetched
constexpr int64_t CACHED = 1 << 18; // numbers of x that stay in a core's cache between panels

struct Sizes {
  int64_t pairs, chunk; // of inputs, both
};

// Where the outputs of one weight go.
struct Part {
  int64_t outputs;
  const bf16* bias; // or null
  bf16* out;        // [R, outputs]
};

__m512 wide(const bf16* numbers) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)numbers));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Adds the chunk of pairs from `first` to `last` to `sums`.
template <int N>
void add_chunk(const bf16* x, const bf16* panel, const Sizes& of, int64_t first, int64_t last,
               __m512 (&sums)[N][2]) {
  __m512 chunk[N][2];
  for (auto& row : chunk) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t k = first; k < last; ++k) {
    const auto low = (__m512bh)_mm512_loadu_si512(panel + k * 2 * PANEL);
    const auto high = (__m512bh)_mm512_loadu_si512(panel + k * 2 * PANEL + PANEL);
    // The processor's own prefetching stops at each page.
    const bf16* later = panel + (k + AHEAD) * 2 * PANEL;
    _mm_prefetch((const char*)later, _MM_HINT_T1);
    _mm_prefetch((const char*)(later + PANEL), _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(((const int32_t*)(x + r * 2 * of.pairs))[k]);
      chunk[r][0] = _mm512_dpbf16_ps(chunk[r][0], pair, low);
      chunk[r][1] = _mm512_dpbf16_ps(chunk[r][1], pair, high);
    }
  }
  for (int r = 0; r < N; ++r)
    for (int half = 0; half < 2; ++half)
      sums[r][half] = first ? _mm512_add_ps(sums[r][half], chunk[r][half]) : chunk[r][half];
}

void store(__m512 sum, const bf16* bias, bf16* out, int64_t room) {
  const auto lanes = (__mmask16)((1u << std::clamp<int64_t>(room, 0, 16)) - 1);
  if (bias) {
    alignas(32) bf16 some[16];
    _mm256_store_si256((__m256i*)some, _mm256_maskz_loadu_epi16(lanes, bias));
    sum = _mm512_add_ps(sum, wide(some));
  }
  const auto narrow = (__m256i)_mm512_cvtneps_pbh(sum);
  if (room >= 16)
    _mm256_storeu_si256((__m256i*)out, narrow);
  else
    _mm256_mask_storeu_epi16(out, lanes, narrow);
}

// N rows from `row` on times one panel, whose first output is number `column` of its part.
template <int N>
void multiply(const bf16* x, const bf16* panel, const Part& part, const Sizes& of, int64_t row,
              int64_t column) {
  __m512 sums[N][2];
  x += row * 2 * of.pairs;
  for (int64_t first = 0; first < of.pairs; first += of.chunk)
    add_chunk<N>(x, panel, of, first, std::min(of.pairs, first + of.chunk), sums);
  for (int half = 0; half < 2; ++half, column += 16) {
    const bf16* bias = part.bias ? part.bias + column : nullptr;
    for (int r = 0; r < N; ++r)
      store(sums[r][half], bias, part.out + (row + r) * part.outputs + column,
            part.outputs - column);
  }
}

using Multiply = decltype(&multiply<1>);

template <int... N>
constexpr std::array<Multiply, sizeof...(N)> for_rows(std::integer_sequence<int, N...>) {
  return {multiply<N + 1>...};
}

constexpr auto MULTIPLY = for_rows(std::make_integer_sequence<int, ROWS>{});

int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// The rows of [first, last) times panel number `index` of all parts, as many at a time as fit the
// registers evenly.
void multiply_panel(const bf16* x, const bf16* packed, const std::vector<Part>& parts,
                    const Sizes& of, int64_t index, int64_t first, int64_t last) {
  const bf16* panel = packed + index * 2 * PANEL * of.pairs;
  auto part = parts.begin();
  for (; index >= panels_of(part->outputs); ++part) index -= panels_of(part->outputs);
  for (int64_t passes = (last - first + ROWS - 1) / ROWS; passes; --passes) {
    const int64_t rows = (last - first) / passes;
    MULTIPLY[rows - 1](x, panel, *part, of, first, index * PANEL);
    first += rows;
  }
}

// The arguments of a product, checked and unpacked.
struct Product {
  Sizes of;
  int64_t rows, panels; // panels of all parts
  const bf16* x;
  const bf16* packed;
  std::vector<Part> parts;
  std::vector<Tensor> results;

  Product(const Tensor& input, const std::optional<Tensor>& bias, const Tensor& handle,
          const std::vector<int64_t>& outputs, int64_t chunk)
      : of{input.size(1) / 2, chunk / 2}, rows(input.size(0)), panels(0),
        x((const bf16*)input.const_data_ptr()),
        packed((const bf16*)*(const int64_t*)handle.const_data_ptr()) {
    STD_TORCH_CHECK(input.is_contiguous() && input.size(1) % 2 == 0 && chunk % 2 == 0 && chunk > 0,
                    "packed_bf16: x is ", rows, " by ", input.size(1), ", chunk ", chunk,
                    ": x must be contiguous, inputs and chunk even");
    const auto* added = bias ? (const bf16*)bias->const_data_ptr() : nullptr;
    for (const int64_t count : outputs) {
      results.push_back(torch::stable::new_empty(input, {rows, count}));
      parts.push_back({count, added, (bf16*)results.back().mutable_data_ptr()});
      added = added ? added + count : nullptr;
      panels += panels_of(count);
    }
  }

  void multiply(const bf16* weights, int64_t panel, int64_t first, int64_t last) const {
    multiply_panel(x, weights, parts, of, panel, first, last);
  }
};

std::vector<Tensor> packed_bf16(const Tensor& x, const std::optional<Tensor>& bias,
                                const Tensor& handle, const std::vector<int64_t>& outputs,
                                int64_t chunk) {
  const Product product(x, bias, handle, outputs, chunk);
  const int64_t group = std::max<int64_t>(ROWS, CACHED / (2 * product.of.pairs) / ROWS * ROWS);
  torch::stable::parallel_for(0, product.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < product.rows; first += group)
      for (int64_t panel = begin; panel < end; ++panel)
        product.multiply(product.packed, panel, first, std::min(product.rows, first + group));
  });
  return product.results;
}

std::vector<Tensor> packed_bf16_experts(const Tensor& x, const Tensor& counts,
                                        const Tensor& handle, const std::vector<int64_t>& outputs,
                                        int64_t chunk) {
  const Product product(x, std::nullopt, handle, outputs, chunk);
  const auto* numbers = (const int64_t*)counts.const_data_ptr();
  const std::vector<int64_t> rows(numbers, numbers + counts.size(0));
  STD_TORCH_CHECK(std::accumulate(rows.begin(), rows.end(), int64_t{0}) == product.rows &&
                      std::all_of(rows.begin(), rows.end(), [](int64_t n) { return n >= 0; }),
                  "packed_bf16_experts: counts must add up to the ", product.rows, " rows of x");
  const int64_t size = product.panels * 2 * PANEL * product.of.pairs;
  // Each thread takes its share of every expert: experts have unlike numbers of rows.
  torch::stable::parallel_for(0, product.panels, 1, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t expert = 0; expert < rows.size(); first += rows[expert++])
      for (int64_t panel = begin; rows[expert] && panel < end; ++panel)
        product.multiply(product.packed + expert * size, panel, first, first + rows[expert]);
  });
  return product.results;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_graft, library) {
  library.def(
      "packed_bf16(Tensor x, Tensor? bias, Tensor handle, int[] outputs, int chunk) -> Tensor[]");
  library.def("packed_bf16_experts(Tensor x, Tensor counts, Tensor handle, int[] outputs, "
              "int chunk) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_graft, CPU, library) {
  library.impl("packed_bf16", TORCH_BOX(&packed_bf16));
  library.impl("packed_bf16_experts", TORCH_BOX(&packed_bf16_experts));
}
