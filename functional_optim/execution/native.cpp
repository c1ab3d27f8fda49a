// Operators over many small tensors on the CPU.
//
// Called from Python tensor by tensor, each of these costs more than the arithmetic on a
// small tensor. Nothing here computes. NAMESPACE is replaced in _native.py.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kGrain = 64;  // Tensors that are worth a thread.

// `Tensor::grad` warns where a parameter is no leaf.
const Tensor& grad_of(const Tensor& param) {
  return param.unsafeGetTensorImpl()->grad();
}

// Whether the elements are in memory as they are read, one after the other.
bool is_plain(const Tensor& tensor) {
  return tensor.layout() == c10::kStrided && tensor.is_cpu() && tensor.has_storage() &&
      !tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor.is_conj() &&
      !tensor.is_neg() && !tensor._is_zerotensor() && tensor.is_contiguous();
}

// The number of elements, the dtype, and the strides unless contiguous, as one number.
int64_t geometry_of(const Tensor& tensor) {
  auto hash = static_cast<uint64_t>(tensor.scalar_type()) + 256 * tensor.numel();
  if (!tensor.is_contiguous()) {
    for (const int64_t stride : tensor.strides()) {
      hash = hash * 1000003 + stride + 1;
    }
  }
  return static_cast<int64_t>(hash);
}

// The same numbers are in _native.py.
constexpr int64_t kMoved = 1;    // A parameter has other memory, or another layout.
constexpr int64_t kChanged = 2;  // Other parameters have a gradient.
constexpr int64_t kOdd = 4;      // A gradient is sparse, or of another dtype.

// Compares parameters with the last scan. A row of `seen` has a parameter's address, its
// geometry, and whether it has a gradient.
int64_t scan(TensorList params, Tensor& seen) {
  auto* rows = static_cast<int64_t*>(seen.mutable_data_ptr());
  std::atomic<int64_t> result{0};
  at::parallel_for(0, params.size(), kGrain, [&](int64_t start, int64_t end) {
    int64_t found = 0;
    for (int64_t i = start; i < end; ++i) {
      const Tensor& param = params[i];
      const Tensor& grad = grad_of(param);
      const auto replaced = [&](int64_t column, int64_t value) {
        return std::exchange(rows[3 * i + column], value) != value;
      };
      const auto address = reinterpret_cast<int64_t>(param.const_data_ptr());
      const bool moved = replaced(0, address);
      found |= replaced(1, geometry_of(param)) || moved ? kMoved : 0;
      found |= replaced(2, grad.defined()) ? kChanged : 0;
      if (grad.defined() &&
          (grad.layout() != c10::kStrided || grad.dtype() != param.dtype())) {
        found |= kOdd;
      }
    }
    result |= found;
  });
  return result;
}

// Calls `copy` with each tensor and its place in `memory`; returns false, and copies
// nothing, if the tensors are not plain memory of this dtype and of this size together.
template <typename Copy>
bool copy_each(TensorList tensors, const Tensor& memory, const Copy& copy) {
  std::vector<size_t> starts;
  size_t end = 0;
  for (const Tensor& tensor : tensors) {
    if (!is_plain(tensor) || tensor.dtype() != memory.dtype()) {
      return false;
    }
    starts.push_back(end);
    end += tensor.nbytes();
  }
  if (end != memory.nbytes()) {
    return false;
  }
  auto* start = static_cast<char*>(memory.mutable_data_ptr());
  at::parallel_for(0, tensors.size(), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (tensors[i].nbytes() != 0) {  // An empty tensor may have no address.
        copy(tensors[i], start + starts[i]);
      }
    }
  });
  return true;
}

bool gather_each(TensorList tensors, const Tensor& memory) {
  return copy_each(tensors, memory, [](const Tensor& tensor, char* place) {
    std::memcpy(place, tensor.const_data_ptr(), tensor.nbytes());
  });
}

// Copies parameters to one piece of memory, and their gradients to another.
bool gather(TensorList params, const Tensor& memory, const Tensor& grad_memory) {
  std::vector<Tensor> grads;  // Kept, whatever other threads do to parameters.
  grads.reserve(params.size());
  for (const Tensor& param : params) {
    grads.push_back(grad_of(param));
    if (!grads.back().defined() || grads.back().sizes() != param.sizes()) {
      return false;
    }
  }
  return gather_each(grads, grad_memory) && gather_each(params, memory);
}

// Copies memory to parameters, and counts it, so that autograd notices.
bool scatter(TensorList params, const Tensor& memory) {
  return copy_each(params, memory, [](const Tensor& param, const char* place) {
    std::memcpy(param.mutable_data_ptr(), place, param.nbytes());
    if (!param.is_inference()) {
      param.unsafeGetTensorImpl()->bump_version();
    }
  });
}

}  // namespace

TORCH_LIBRARY(NAMESPACE, library) {
  library.def("scan(Tensor[] params, Tensor(a!) seen) -> int");
  library.def("gather(Tensor[] params, Tensor(a!) to, Tensor(b!) grads_to) -> bool");
  library.def("scatter(Tensor(a!)[] params, Tensor memory) -> bool");
}

TORCH_LIBRARY_IMPL(NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("scan", scan);
  library.impl("gather", gather);
  library.impl("scatter", scatter);
}
