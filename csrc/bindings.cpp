// The module and its C++ kernels: raw addresses in, nothing allocated, the GIL released while kernels run.
// Shapes, dtypes and devices were checked in gradclust_fast/ops before a call gets here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ceilings.h"
#include "cluster.h"
#include "conv_dot.h"
#include "conv_gram.h"
#include "conv_moments.h"
#include "conv_sketch.h"
#include "conv_sqnorm.h"
#include "conv_weight_sqnorm.h"
#include "embedding.h"
#include "grad_gram.h"
#include "grad_moments.h"
#include "grad_quantities.h"
#include "grad_sqnorm.h"
#include "grad_weight_sqnorm.h"
#include "norm_grads.h"
#include "sign_product.h"
#include "stamp.h"
#include "tuples.h"

namespace py = pybind11;
using namespace gradclust;

#if defined(GRADCLUST_HAVE_CUDA)
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect_isa() {
  Isa best = Isa::baseline;
#if defined(GRADCLUST_HAVE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
#endif
  const char* forced = std::getenv("GRADCLUST_CPU_ISA");  // may only lower what the processor has
  if (forced && *forced) {
    Isa wanted = !strcmp(forced, "baseline") ? Isa::baseline : !strcmp(forced, "avx2") ? Isa::avx2 : Isa::avx512;
    if (wanted == Isa::avx512 && strcmp(forced, "avx512"))
      throw std::runtime_error(std::string("GRADCLUST_CPU_ISA must be baseline, avx2 or avx512, got ") + forced);
    if (wanted > best)
      throw std::runtime_error(std::string("GRADCLUST_CPU_ISA=") + forced + ": this processor does not have it");
    best = wanted;
  }
  return best;
}

Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

const char* isa_name() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[int(isa())];
}

// Whether pairs of bf16 are multiplied in one instruction.
bool bf16_dots() {
#if defined(GRADCLUST_HAVE_AVX2) && defined(GRADCLUST_ASSEMBLES_BF16)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if defined(GRADCLUST_HAVE_AVX2)
#define PICK(launcher) \
  (isa() == Isa::avx512 ? &avx512::launcher : isa() == Isa::avx2 ? &avx2::launcher : &baseline::launcher)
#else
#define PICK(launcher) (&baseline::launcher)
#endif

using nogil = py::call_guard<py::gil_scoped_release>;

void bind_linear(py::module_& m) {
  m.def("grad_sqnorm_cpu", [](const LinearTuple& f, int route, uintptr_t out, int threads) {
    PICK(grad_sqnorm_cpu)(linear(f), SequenceRoute(route), pointer(out), threads);
  }, nogil());
  m.def("grad_gram_cpu", [](const LinearTuple& f, uintptr_t out, int threads) {
    PICK(grad_gram_cpu)(linear(f), pointer(out), threads);
  }, nogil());
  m.def("grad_moments_cpu", [](const LinearTuple& f, uintptr_t first, uintptr_t second, int threads) {
    PICK(grad_moments_cpu)(linear(f), pointer(first), pointer(second), threads);
  }, nogil());
  m.def("grad_weight_sqnorm_cpu", [](const LinearTuple& f, uintptr_t weight_grad, uintptr_t sqnorm, int threads) {
    PICK(grad_weight_sqnorm_cpu)(linear(f), pointer(weight_grad), pointer(sqnorm), threads);
  }, nogil());
  // questions: (sqnorm, route, sketch, left, right, P, Q, dot, center_grad, center_act, K, rank)
  m.def("grad_quantities_cpu", [](const LinearTuple& f, const std::array<int64_t, 12>& q, int threads) {
    auto at = [&](int i) { return pointer(uintptr_t(q[size_t(i)])); };
    Questions questions{at(0), SequenceRoute(q[1]), at(2), at(3), at(4), q[5], q[6], at(7), at(8), at(9), q[10], q[11]};
    PICK(grad_quantities_cpu)(linear(f), questions, threads);
  }, nogil());
}

// The functions with a workspace return its size in bytes and do nothing else while it is 0.
void bind_cluster(py::module_& m) {
  m.def("assign_cpu", [](const RowsTuple& dot, uintptr_t center_sqnorm, uintptr_t grad_sqnorm, uintptr_t weight,
                         uintptr_t label, uintptr_t cost, int threads) {
    PICK(assign_cpu)(rows(dot), pointer(center_sqnorm), pointer(grad_sqnorm), pointer(weight), pointer<int64_t>(label),
                     pointer(cost), threads);
  }, nogil());
  m.def("assign_points_cpu", [](const RowsTuple& points, uintptr_t centers, int64_t K, uintptr_t weight, uintptr_t label,
                                uintptr_t cost, uintptr_t workspace, int threads) {
    int64_t bytes = 0;
    PICK(assign_points_cpu)(rows(points), pointer(centers), K, pointer<double>(weight), pointer<int64_t>(label),
                            pointer(cost), pointer(workspace), &bytes, threads);
    return bytes;
  }, nogil());
  m.def("cluster_sums_cpu", [](const RowsTuple& points, uintptr_t labels, int64_t K, uintptr_t sums, uintptr_t counts,
                               uintptr_t workspace, int threads) {
    int64_t bytes = 0;
    PICK(cluster_sums_cpu)(rows(points), pointer<int64_t>(labels), K, pointer(sums), pointer<int64_t>(counts),
                           pointer(workspace), &bytes, threads);
    return bytes;
  }, nogil());
  m.def("exact_moves_cpu", [](const RowsTuple& points, uintptr_t center, uintptr_t order, int64_t K, uintptr_t labels,
                              uintptr_t J, uintptr_t moved, uintptr_t workspace, int threads) {
    int64_t bytes = 0;
    PICK(exact_moves_cpu)(rows(points), pointer<double>(center), pointer<int64_t>(order), K, pointer<int64_t>(labels),
                          pointer<double>(J), pointer<int64_t>(moved), pointer(workspace), &bytes, threads);
    return bytes;
  }, nogil());
}

void bind_conv(py::module_& m) {
  m.def("conv_sqnorm_cpu", [](const ConvTuple& f, int route, uintptr_t out, int threads) {
    PICK(conv_sqnorm_cpu)(conv(f), ConvRoute(route), pointer(out), threads);
  }, nogil());
  m.def("conv_gram_cpu", [](const ConvTuple& f, bool positions, int route, uintptr_t out, int threads) {
    PICK(conv_gram_cpu)(conv(f), positions, GradientRoute(route), pointer(out), threads);
  }, nogil());
  m.def("conv_moments_cpu", [](const ConvTuple& f, int route, uintptr_t first, uintptr_t second, int threads) {
    PICK(conv_moments_cpu)(conv(f), GradientRoute(route), pointer(first), pointer(second), threads);
  }, nogil());
  m.def("conv_weight_sqnorm_cpu", [](const ConvTuple& f, int route, uintptr_t weight_grad, uintptr_t sqnorm, int threads) {
    PICK(conv_weight_sqnorm_cpu)(conv(f), GradientRoute(route), pointer(weight_grad), pointer(sqnorm), threads);
  }, nogil());
  // sides: (left, right, P, Q)
  m.def("conv_sketch_cpu", [](const ConvTuple& f, const std::array<int64_t, 4>& s, int route, uintptr_t out, int threads) {
    Sides sides{pointer(uintptr_t(s[0])), pointer(uintptr_t(s[1])), s[2], s[3]};
    PICK(conv_sketch_cpu)(conv(f), sides, SketchRoute(route), pointer(out), threads);
  }, nogil());
  // centers: (grad, act, K, rank)
  m.def("conv_dot_cpu", [](const ConvTuple& f, const std::array<int64_t, 4>& c, bool filters, int route, uintptr_t out,
                           int threads) {
    Centers centers{pointer(uintptr_t(c[0])), pointer(uintptr_t(c[1])), c[2], c[3]};
    PICK(conv_dot_cpu)(conv(f), centers, filters, GradientRoute(route), pointer(out), threads);
  }, nogil());
}

void bind_embedding(py::module_& m) {
  m.def("embedding_sqnorm_cpu", [](const EmbeddingTuple& f, uintptr_t out, int threads) {
    PICK(embedding_sqnorm_cpu)(embedding(f), pointer(out), threads);
  }, nogil());
  m.def("embedding_gram_cpu", [](const EmbeddingTuple& f, uintptr_t out, int threads) {
    PICK(embedding_gram_cpu)(embedding(f), pointer(out), threads);
  }, nogil());
  m.def("embedding_moments_cpu", [](const EmbeddingTuple& f, uintptr_t first, uintptr_t second, int threads) {
    PICK(embedding_moments_cpu)(embedding(f), pointer(first), pointer(second), threads);
  }, nogil());
  m.def("embedding_sketch_cpu", [](const EmbeddingTuple& f, uintptr_t left, uintptr_t right, int64_t P, int64_t Q,
                                   uintptr_t out, int threads) {
    PICK(embedding_sketch_cpu)(embedding(f), pointer(left), pointer(right), P, Q, pointer(out), threads);
  }, nogil());
  m.def("embedding_dot_cpu", [](const EmbeddingTuple& f, uintptr_t center_index, uintptr_t center_grad, int64_t K,
                                int64_t rank, uintptr_t out, int threads) {
    PICK(embedding_dot_cpu)(embedding(f), pointer(center_index), pointer(center_grad), K, rank, pointer(out), threads);
  }, nogil());
}

void bind_norm(py::module_& m) {
  m.def("norm_grads_cpu", [](const NormTuple& t, double eps, bool rms, uintptr_t weight, uintptr_t bias, int threads) {
    PICK(norm_grads_cpu)(norm(t), eps, rms, pointer(weight), pointer(bias), threads);
  }, nogil());
}

void bind_signs(py::module_& m) {
  m.def("sign_product_cpu", [](const SignTuple& t, double scale, uintptr_t out, int threads) {
    PICK(sign_product_cpu)(signs(t, scale), pointer(out), threads);
  }, nogil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gradclust_fast native kernels (torch-free)";
  m.attr("isa") = isa_name();
  m.attr("bf16_dots") = bf16_dots();
  m.attr("stamp") = stamp;
  m.attr("compiler") = GRADCLUST_COMPILER;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(GRADCLUST_HAVE_CUDA)
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.attr("cuda_reason") = GRADCLUST_CUDA_REASON;
  m.attr("cuda_archs") = GRADCLUST_CUDA_ARCHS;
  m.def("fma_peak_cpu", [](int64_t rounds, int threads) {
    double sink = 0;
    int64_t flops = 0;
    PICK(fma_peak_cpu)(rounds, &sink, &flops, threads);
    return flops;
  }, nogil());
  bind_linear(m);
  bind_cluster(m);
  bind_conv(m);
  bind_embedding(m);
  bind_norm(m);
  bind_signs(m);
#if defined(GRADCLUST_HAVE_CUDA)
  bind_cuda(m);
#endif
}
