// Σ_b G_b and every ‖G_b‖² of a linear layer on sequences, in the FLOPs of the first alone.
//
// v1  The weight gradient is cut into blocks, and the batch into parts where there are few of them; a thread owns a block
//     of a part. Examples are packed centred, G_b is made strip by strip, and a strip is squared and added to the sums
//     while it is in the L1 cache; no G_b exists. Parts depend on the sizes alone and are added in order: the same bits
//     for any number of threads (bench/kernels/bench_grad_weight_sqnorm.py).
#include "grad_weight_sqnorm.h"

#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch scratch, sums_scratch, norms_scratch, means_scratch, wild_scratch, scaled_scratch;

constexpr int64_t BLOCK = 192, LEAST_BLOCK = 96;  // rows and columns; few examples: smaller, to occupy all threads
constexpr int64_t STRIP_ROWS = 48;                 // a strip of STRIP_ROWS × NR stays in the L1 cache
constexpr int64_t BLOCK_ROWS = 128;                // positions packed together
constexpr int64_t TASKS = 16, LEAST_EXAMPLES = 4;

// Rows o0.. and columns i0.. of [O, I (+ 1)], and where what belongs to it lies.
template <typename acc> struct Block {
  int64_t o0, O, i0, I;
  int64_t O_padded() const { return round_up(O, LANES<acc>); }
  int64_t I_padded() const { return round_up(I, LANES<acc>); }
};

// Sums and means over the positions of every example, zero beyond the features. The constant feature's mean is 1.
template <typename acc> struct Means {
  int64_t I, O;                    // from example to example
  acc *act, *grad_total, *grad;    // ā [B, I], s and d̄ [B, O]
  bool* wild;                      // [B] whether s left the range although d̄ did not: nothing is centred, ā = d̄ = 0
};

template <typename in_t> void add_positions(const LinearFactors& f, int64_t b, const Means<acc_t<in_t>>& means) {
  using acc = acc_t<in_t>;
  const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride_b;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
  acc *mean = means.act + b * means.I, *total = means.grad_total + b * means.O, *grad_mean = means.grad + b * means.O;
  for (int64_t i = f.I; i < means.I; ++i) mean[i] = i == f.I && f.bias;
  for (int64_t o = f.O; o < means.O; ++o) total[o] = 0;
  exact_sums(act, f.act_stride_t, f.T, f.I, scratch.get<acc>(f.I), mean);
  exact_sums(grad, f.grad_stride_t, f.T, f.O, total, grad_mean);
  bool wild = false;
  for (int64_t o = 0; o < f.O; ++o) wild |= total[o] - total[o] != 0 && grad_mean[o] - grad_mean[o] == 0;
  means.wild[b] = wild;
  if (!wild) return;
  for (int64_t i = 0; i < f.I; ++i) mean[i] = 0;
  for (int64_t o = 0; o < f.O; ++o) grad_mean[o] = 0;
}

// G_b = D̃ᵀÃ + s āᵀ over one block's rows and columns, from packed centred factors.
template <typename acc> struct Example {
  Packed<acc> A, D;
  const acc *mean, *total;  // ā and s
  bool wild;                // s is added where ā is not 0 alone
};

template <typename in_t>
Example<acc_t<in_t>> pack_example(const LinearFactors& f, const Block<acc_t<in_t>>& block, int64_t b,
                                  const Means<acc_t<in_t>>& means, acc_t<in_t>* memory) {
  using acc = acc_t<in_t>;
  const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride_b + block.i0;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + block.o0;
  const acc *mean = means.act + b * means.I + block.i0, *grad_mean = means.grad + b * means.O + block.o0;
  acc* packed_grad = memory + f.T * block.I_padded();
  const int64_t features = max_of(0, min_of(block.I, f.I - block.i0));  // without the constant one of the bias
  for (int64_t j = 0; j < block.I; j += NR<acc>) {
    const int64_t width = Panels<acc>{block.I}.width(j), columns = max_of(0, min_of(width, features - j));
    pack_columns(memory + j * f.T, width, act + j, f.act_stride_t, f.T, columns, mean + j);
  }
  pack_all_columns(packed_grad, grad, f.grad_stride_t, f.T, block.O, grad_mean);
  const acc* total = means.grad_total + b * means.O + block.o0;
  return {{memory, block.I, f.T}, {packed_grad, block.O, f.T}, mean, total, means.wild[b]};
}

// Numbers that pack_example takes.
template <typename acc> int64_t example_size(const LinearFactors& f, const Block<acc>& block) {
  return f.T * (block.I_padded() + block.O_padded());
}

// Examples b0 … b1 into a block's sums, panel by panel [O padded, width], and their squares into norms [B].
template <typename in_t>
void add_examples(const LinearFactors& f, const Block<acc_t<in_t>>& block, const Means<acc_t<in_t>>& means, int64_t b0,
                  int64_t b1, acc_t<in_t>* sums, double* norms) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>;
  const int64_t O_padded = block.O_padded(), size = example_size(f, block), most = max_of(1, BLOCK_ROWS / f.T);
  Example<acc> packed[BLOCK_ROWS];
  acc* memory = scratch.get<acc>(min_of(most, b1 - b0) * size);
  acc strip[STRIP_ROWS * NR<acc>];
  for (int64_t b = b0; b < b1; b += most) {
    const int64_t count = min_of(most, b1 - b);
    for (int64_t e = 0; e < count; ++e) {
      packed[e] = pack_example<in_t>(f, block, b + e, means, memory + e * size);
      norms[b + e] = 0;
    }
    for (int64_t i = 0; i < block.I; i += NR<acc>)
      for (int64_t o = 0; o < O_padded; o += STRIP_ROWS)
        for (int64_t e = 0; e < count; ++e) {
          const int64_t rows = min_of(STRIP_ROWS, O_padded - o), width = packed[e].A.width(i);
          strip_product(packed[e].D, o, o + rows, packed[e].A, i, strip);
          acc* to = sums + i * O_padded + o * width;
          vec_t<acc> norm = {};
          if (packed[e].wild)
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t j = 0; j < width; ++j)
                if (packed[e].mean[i + j] != 0) strip[r * width + j] += packed[e].total[o + r] * packed[e].mean[i + j];
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < width; j += L) {
              vec_t<acc> G = load_vec(strip + r * width + j);
              if (!packed[e].wild) G += packed[e].total[o + r] * load_vec(packed[e].mean + i + j);
              store_vec(to + r * width + j, load_vec(to + r * width + j) + G);
              norm += G * G;
            }
          norms[b + e] += sum_lanes<acc>(norm);
        }
  }
}

template <typename in_t>
void grad_weight_sqnorm_kernel(const LinearFactors& f, acc_t<in_t>* weight_grad, acc_t<in_t>* sqnorm, int threads) {
  using acc = acc_t<in_t>;
  const int64_t wide = f.I + f.bias, most_parts = max_of(1, min_of(TASKS, f.B / LEAST_EXAMPLES));
  int64_t block_o = BLOCK, block_i = BLOCK / NR<acc> * NR<acc>;
  auto count = [&] { return ((f.O + block_o - 1) / block_o) * ((wide + block_i - 1) / block_i); };
  if (count() * most_parts < TASKS) block_o = LEAST_BLOCK;
  if (count() * most_parts < TASKS) block_i = LEAST_BLOCK / NR<acc> * NR<acc>;
  const int64_t blocks_i = (wide + block_i - 1) / block_i, blocks = count();
  const int64_t room = round_up(min_of(f.O, block_o), 16) * round_up(min_of(wide, block_i), 16);
  const int64_t parts = max_of(1, min_of(TASKS / blocks, most_parts)), share = (f.B + parts - 1) / parts;
  acc* partial = parts > 1 ? sums_scratch.get<acc>(blocks * parts * room) : nullptr;
  double* norms = norms_scratch.get<double>(blocks * f.B);
  Means<acc> means{round_up(wide, 64), round_up(f.O, 64), nullptr, nullptr, nullptr, wild_scratch.get<bool>(f.B)};
  means.act = means_scratch.get<acc>(f.B * (means.I + 2 * means.O));
  means.grad_total = means.act + f.B * means.I, means.grad = means.grad_total + f.B * means.O;

  auto block_at = [&](int64_t n) {
    const int64_t o0 = n / blocks_i * block_o, i0 = n % blocks_i * block_i;
    return Block<acc>{o0, min_of(block_o, f.O - o0), i0, min_of(block_i, wide - i0)};
  };
  auto put = [&](const Block<acc>& block, const acc* sums) {
    for (int64_t i = 0; i < block.I; i += NR<acc>) {
      const int64_t width = Panels<acc>{block.I}.width(i), n = min_of(width, block.I - i);
      for (int64_t o = 0; o < block.O; ++o)
        memcpy(weight_grad + (block.o0 + o) * wide + block.i0 + i, sums + i * block.O_padded() + o * width,
               size_t(n) * sizeof(acc));
    }
  };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < f.B; ++b) add_positions<in_t>(f, b, means);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * parts; ++task) {
      const Block<acc> block = block_at(task / parts);
      const int64_t b0 = task % parts * share, b1 = min_of(f.B, b0 + share);
      acc* sums = parts > 1 ? partial + task * room : sums_scratch.get<acc>(room);
      memset(sums, 0, size_t(room) * sizeof(acc));
      if (b0 < b1) add_examples<in_t>(f, block, means, b0, b1, sums, norms + task / parts * f.B);
      if (parts == 1) put(block, sums);
    }
    if (parts > 1) {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < blocks; ++n) {
        acc* sums = partial + n * parts * room;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = 0; i < room; ++i) sums[i] += sums[part * room + i];
        put(block_at(n), sums);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < f.B; ++b) {
      double total = 0;
      for (int64_t n = 0; n < blocks; ++n) total += norms[n * f.B + b];
      if (!in_range<acc>(total)) {
        const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride_b;
        const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
        total = sqnorm_scaled(false, act, f.act_stride_t, grad, f.grad_stride_t, f.T, f.I, f.O, f.bias, scaled_scratch,
                              total);
      }
      sqnorm[b] = acc(total);
    }
  }
}

}  // namespace

void grad_weight_sqnorm_cpu(const LinearFactors& f, void* weight_grad, void* sqnorm, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    grad_weight_sqnorm_kernel<in_t>(f, static_cast<acc*>(weight_grad), static_cast<acc*>(sqnorm), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
