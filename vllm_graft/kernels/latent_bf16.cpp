// Latent attention of single queries over a paged cache, by AVX-512's dot products of bf16 pairs.
//
// Every query attends by itself: what it gives does not depend on the queries around it.
//
// Legend: T queries, N heads, R latent rank, W width of keys (rank and rotated part, even), L keys
// of a query. The first R numbers of a key are its value.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;
using bf16 = uint16_t;

constexpr int64_t LANES = 16; // heads that are scored together, one in each lane
constexpr int64_t PAGE = 16;  // keys that lie one behind the other
constexpr int64_t NEAR = 512; // keys whose values stay in a core's cache
constexpr int HEADS = 6;      // heads and
constexpr int PARTS = 4;      // vectors of values whose sums fill 24 of the 32 registers

struct Sizes {
  int64_t heads, rank, width, page; // page: numbers from one page to the next
  float scale;
};

// The keys of one query.
struct Keys {
  const bf16* cache;
  const int32_t* table;
  int64_t length;

  const bf16* at(int64_t key, const Sizes& of) const {
    return cache + table[key / PAGE] * of.page + key % PAGE * of.width;
  }
};

// exp of numbers that are not above 0, to about one unit in the last place (Cephes' polynomial).
__m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                             1.6666665459e-1f, 5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
  sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(sum, n);
}

// What one thread needs for a query: it is kept from one to the next.
struct Room {
  std::vector<int32_t> query;  // pairs [W / 2, LANES]
  std::vector<float> weights;  // [L, LANES]
  std::vector<float> sums;     // [LANES, R]
  alignas(64) std::array<float, LANES> total;
};

void turn_query(const bf16* q, int64_t heads, const Sizes& of, Room& room) {
  const int64_t pairs = of.width / 2;
  room.query.assign(pairs * LANES, 0);
  for (int64_t head = 0; head < heads; ++head) {
    const auto* own = (const int32_t*)(q + head * of.width);
    for (int64_t k = 0; k < pairs; ++k) room.query[k * LANES + head] = own[k];
  }
}

// Scores of all heads with the keys, then their softmax without its division.
void weigh(const Keys& keys, const Sizes& of, Room& room) {
  const int64_t pairs = of.width / 2;
  room.weights.resize(std::max<size_t>(room.weights.size(), (keys.length + PAGE) * LANES));
  float* weights = room.weights.data();
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  for (int64_t key = 0; key < keys.length; key += PAGE) {
    const auto* page = (const int32_t*)keys.at(key, of);
    __m512 scores[PAGE];
    for (auto& score : scores) score = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
      const auto query = (__m512bh)_mm512_loadu_si512(room.query.data() + k * LANES);
#pragma GCC unroll 16
      for (int64_t j = 0; j < PAGE; ++j)
        scores[j] = _mm512_dpbf16_ps(
            scores[j], (__m512bh)_mm512_set1_epi32(page[j * pairs + k]), query);
    }
    for (int64_t j = 0; j < std::min(PAGE, keys.length - key); ++j) {
      const __m512 score = _mm512_mul_ps(scores[j], _mm512_set1_ps(of.scale));
      most = _mm512_max_ps(most, score);
      _mm512_storeu_ps(weights + (key + j) * LANES, score);
    }
  }
  __m512 total = _mm512_setzero_ps();
  for (int64_t key = 0; key < keys.length; ++key) {
    const __m512 score = _mm512_loadu_ps(weights + key * LANES);
    const __m512 weight = exponential(_mm512_sub_ps(score, most));
    total = _mm512_add_ps(total, weight);
    _mm512_storeu_ps(weights + key * LANES, weight);
  }
  _mm512_store_ps(room.total.data(), total);
}

// Adds the values of keys [first, last), times the weights of H heads, to D vectors of their sums.
template <int H, int D>
void add_values(const Keys& keys, const Sizes& of, Room& room, int64_t first, int64_t last,
                int64_t head, int64_t part) {
  __m512 sums[H][D];
  float* kept = room.sums.data() + head * of.rank + part * LANES;
  for (int h = 0; h < H; ++h)
    for (int d = 0; d < D; ++d) sums[h][d] = _mm512_loadu_ps(kept + h * of.rank + d * LANES);
  for (int64_t key = first; key < last; ++key) {
    const bf16* value = keys.at(key, of) + part * LANES;
    const float* weights = room.weights.data() + key * LANES + head;
    __m512 wide[D];
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      const auto narrow = _mm256_loadu_si256((const __m256i*)(value + d * LANES));
      wide[d] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
#pragma GCC unroll 6
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d)
        sums[h][d] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h]), wide[d], sums[h][d]);
  }
  for (int h = 0; h < H; ++h)
    for (int d = 0; d < D; ++d) _mm512_storeu_ps(kept + h * of.rank + d * LANES, sums[h][d]);
}

using AddValues = decltype(&add_values<1, 1>);

template <int... N>
constexpr std::array<AddValues, sizeof...(N)> for_sizes(std::integer_sequence<int, N...>) {
  return {add_values<N / PARTS + 1, N % PARTS + 1>...};
}

constexpr auto ADD_VALUES = for_sizes(std::make_integer_sequence<int, HEADS * PARTS>{});

// One query of up to LANES heads; out: [heads, R].
void attend(const bf16* q, const Keys& keys, int64_t heads, const Sizes& of, Room& room,
            bf16* out) {
  turn_query(q, heads, of, room);
  weigh(keys, of, room);
  room.sums.assign(LANES * of.rank, 0);
  const int64_t vectors = of.rank / LANES;
  for (int64_t first = 0; first < keys.length; first += NEAR)
    for (int64_t part = 0; part < vectors; part += PARTS)
      for (int64_t head = 0; head < heads; head += HEADS) {
        const int64_t h = std::min<int64_t>(HEADS, heads - head);
        const int64_t d = std::min<int64_t>(PARTS, vectors - part);
        ADD_VALUES[(h - 1) * PARTS + d - 1](keys, of, room, first,
                                            std::min(keys.length, first + NEAR), head, part);
      }
  for (int64_t head = 0; head < heads; ++head) {
    const __m512 total = _mm512_set1_ps(room.total[head]);
    for (int64_t i = 0; i < of.rank; i += LANES) {
      const __m512 sum = _mm512_loadu_ps(room.sums.data() + head * of.rank + i);
      _mm256_storeu_si256((__m256i*)(out + head * of.rank + i),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(sum, total)));
    }
  }
}

Tensor latent_bf16(const Tensor& q, const Tensor& cache, const Tensor& table,
                   const Tensor& sequence, const Tensor& lengths, int64_t rank, double scale) {
  const Sizes of{q.size(1), rank, q.size(2), cache.stride(0), (float)scale};
  STD_TORCH_CHECK(q.is_contiguous() && table.is_contiguous() && cache.size(1) == PAGE &&
                      cache.stride(1) == of.width && cache.stride(2) == 1 &&
                      cache.size(2) == of.width && of.width % 2 == 0 && rank % LANES == 0 &&
                      rank <= of.width,
                  "latent_bf16: q [T, N, ", of.width, "] and a cache [blocks, ", cache.size(1),
                  ", ", cache.size(2), "] with rank ", rank, ": pages of 16 contiguous keys of an "
                  "even width are expected, and a rank that is a multiple of 16");
  const int64_t queries = q.size(0), groups = (of.heads + LANES - 1) / LANES;
  Tensor out = torch::stable::new_empty(q, {queries, of.heads, rank});
  const auto* from = (const bf16*)q.const_data_ptr();
  auto* to = (bf16*)out.mutable_data_ptr();
  const auto* blocks = (const int32_t*)table.const_data_ptr();
  const auto* of_query = (const int64_t*)sequence.const_data_ptr();
  const auto* seen = (const int32_t*)lengths.const_data_ptr();
  const int64_t count = queries * groups, wide = table.size(1);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    thread_local Room room;
    for (int64_t i = begin; i < end; ++i) {
      // From both ends: later queries of a prompt see more keys.
      const int64_t item = i % 2 ? count - 1 - i / 2 : i / 2;
      const int64_t t = item / groups, head = item % groups * LANES;
      const Keys keys{(const bf16*)cache.const_data_ptr(), blocks + of_query[t] * wide, seen[t]};
      attend(from + (t * of.heads + head) * of.width, keys, std::min(LANES, of.heads - head), of,
             room, to + (t * of.heads + head) * rank);
    }
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_graft, library) {
  library.def("latent_bf16(Tensor q, Tensor cache, Tensor table, Tensor sequence, Tensor lengths, "
              "int rank, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_graft, CPU, library) {
  library.impl("latent_bf16", TORCH_BOX(&latent_bf16));
}
