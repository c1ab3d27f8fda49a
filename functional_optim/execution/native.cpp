// What a step asks of every tensor, and copies of many small ones.
//
// Asked in Python, each question costs a microsecond a tensor after a backward, when
// memory is cold: more than the arithmetic on small tensors. Nothing here computes.
//
// A Python tensor is given by its address; the word at `offset` in it points to its
// TensorImpl. The caller keeps these tensors alive, and holds the interpreter's lock, so
// that nobody takes a gradient away in between. Gradients are asked for anew in each
// call: nobody else keeps them.

#include <Python.h>

#include <ATen/core/TensorBase.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

c10::TensorImpl* impl_of(int64_t object, int64_t offset) {
  return *reinterpret_cast<c10::TensorImpl**>(object + offset);
}

const at::TensorBase& grad_of(const c10::TensorImpl& tensor) {
  // at::Tensor adds nothing but functions, in headers that take seconds to read.
  return reinterpret_cast<const at::TensorBase&>(tensor.grad());
}

bool is_plain(const c10::TensorImpl& tensor) {
  return tensor.layout() == c10::kStrided && tensor.device().is_cpu() &&
      !tensor.is_python_dispatch() &&
      tensor.has_storage() && !tensor.is_neg() && !tensor._is_zerotensor();
}

// The address of the elements, 0 if they do not lie there one after the other.
int64_t place_of(const c10::TensorImpl& tensor) {
  if (!is_plain(tensor) || !tensor.is_contiguous()) {
    return 0;
  }
  return reinterpret_cast<int64_t>(tensor.data());
}

// Keeps a value; returns whether it is another one than before.
template <typename T>
bool keep(T& kept, T value) {
  const bool changed = kept != value;
  kept = value;
  return changed;
}

// The same numbers stand in _scanning.py.
constexpr int64_t kMoved = 1;    // A parameter lies elsewhere, or is laid out anew.
constexpr int64_t kChanged = 2;  // Other parameters have a gradient.
constexpr int64_t kOdd = 4;      // A gradient is sparse, or of another dtype.
constexpr int64_t kFailed = 8;   // Something could not be asked.

constexpr int64_t kDtypes = 128;
constexpr int64_t kMany = 64;   // Tensors that are worth a second thread.
constexpr int64_t kBlock = 16;  // Tensors whose memory is fetched at once.

// Calls a function for each index. A parallel region of one thread would end the others,
// and the next one make them anew.
template <typename F>
void each(int64_t count, int64_t threads, const F& function) {
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) {
      function(i);
    }
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    function(i);
  }
}

char* memory_at(int64_t place) {
  return reinterpret_cast<char*>(place);
}

void copy(char* to, const char* from, int64_t size) {
  if (size != 0) {  // What is empty may lie nowhere.
    std::memcpy(to, from, size);
  }
}

// The number of elements, whether they are contiguous, and the dtype, in one number.
int64_t geometry_of(const c10::TensorImpl& tensor) {
  const auto dtype = static_cast<int64_t>(c10::typeMetaToScalarType(tensor.dtype()));
  return (2 * tensor.numel() + (tensor.is_contiguous() ? 1 : 0)) * kDtypes + dtype;
}

// Looks at one parameter; see `scan`.
int64_t look(
    const c10::TensorImpl* param, int64_t& place, int64_t& shape, int64_t& grad,
    int8_t& given) noexcept {
  try {
    int64_t found = 0;
    const auto here = reinterpret_cast<int64_t>(param->data());
    const bool moved =
        keep(place, here) | keep(shape, geometry_of(*param));
    const at::TensorBase& own = grad_of(*param);
    grad = 0;
    if (own.defined()) {
      const c10::TensorImpl& tensor = *own.unsafeGetTensorImpl();
      if (tensor.layout() != c10::kStrided || tensor.dtype() != param->dtype()) {
        found |= kOdd;
      } else if (tensor.sizes() == param->sizes()) {
        grad = place_of(tensor);
      }
    }
    found |= moved ? kMoved : 0;
    found |= keep<int8_t>(given, own.defined()) ? kChanged : 0;
    return found;
  } catch (...) {
    return kFailed;
  }
}

void fetch(const c10::TensorImpl* tensor) {
  const auto* start = reinterpret_cast<const char*>(tensor);
  for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) {
    __builtin_prefetch(start + at);
  }
}

// Fetches what `look` follows from pointer to pointer, of many tensors at once: one
// after the other would wait for memory ten times a tensor.
void fetch_all(const int64_t* objects, int64_t offset, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(reinterpret_cast<const char*>(objects[i] + offset));
  }
  for (int64_t i = 0; i < count; ++i) {
    fetch(impl_of(objects[i], offset));
  }
  for (int64_t i = 0; i < count; ++i) {
    const c10::TensorImpl* param = impl_of(objects[i], offset);
    __builtin_prefetch(param->unsafe_storage().unsafeGetStorageImpl());
    __builtin_prefetch(param->autograd_meta());
  }
  for (int64_t i = 0; i < count; ++i) {
    fetch(grad_of(*impl_of(objects[i], offset)).unsafeGetTensorImpl());
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto& grad = grad_of(*impl_of(objects[i], offset));
    if (grad.defined()) {
      const c10::TensorImpl* own = grad.unsafeGetTensorImpl();
      __builtin_prefetch(own->unsafe_storage().unsafeGetStorageImpl());
    }
  }
}

}  // namespace

extern "C" {

// Looks at parameters and their gradients.
//
//   places:  where each parameter lies
//   shapes:  its number of elements, whether it is contiguous, and its dtype
//   grads:   where its gradient lies; 0 if that cannot be read as one piece of memory
//   given:   whether it has a gradient
int64_t scan(
    const int64_t* objects, int64_t offset, int64_t count, int64_t threads,
    int64_t* places, int64_t* shapes, int64_t* grads, int8_t* given) {
  std::atomic<int64_t> found{0};
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  each(blocks, count < kMany ? 1 : threads, [=, &found](int64_t block) {
    const int64_t start = block * kBlock;
    const int64_t end = std::min(start + kBlock, count);
    fetch_all(objects + start, offset, end - start);
    int64_t told = 0;
    for (int64_t i = start; i < end; ++i) {
      told |= look(
          impl_of(objects[i], offset), places[i], shapes[i], grads[i], given[i]);
    }
    if (told != 0) {
      found |= told;
    }
  });
  return found;
}

// Copies tensors to one piece of memory: each from its place to its start, in bytes, up
// to the start of the next.
void gather(
    char* to, const int64_t* places, const int64_t* starts, int64_t count,
    int64_t threads) {
  each(count, count < kMany ? 1 : threads, [=](int64_t i) {
    copy(to + starts[i], memory_at(places[i]), starts[i + 1] - starts[i]);
  });
}

// The way back.
void scatter(
    const char* from, const int64_t* places, const int64_t* starts, int64_t count,
    int64_t threads) {
  each(count, count < kMany ? 1 : threads, [=](int64_t i) {
    copy(memory_at(places[i]), from + starts[i], starts[i + 1] - starts[i]);
  });
}

// As `gather`, for the gradients of some of the parameters. Returns whether all still
// lie where `scan` found them, each in one piece; else nothing is copied.
int64_t gather_grads(
    char* to, const int64_t* objects, int64_t offset, const int64_t* grads,
    const int64_t* members, const int64_t* starts, int64_t count, int64_t threads) {
  const auto lies_there = [=](int64_t i) {
    const at::TensorBase& grad = grad_of(*impl_of(objects[members[i]], offset));
    const int64_t place = grads[members[i]];
    return grad.defined() && place_of(*grad.unsafeGetTensorImpl()) == place &&
        (place != 0 || starts[i + 1] == starts[i]);
  };
  std::atomic<int64_t> others{0};
  each(count, count < kMany ? 1 : threads, [=, &others](int64_t i) {
    if (!lies_there(i)) {
      ++others;
    }
  });
  if (others != 0) {
    return 0;
  }
  each(count, count < kMany ? 1 : threads, [=](int64_t i) {
    copy(to + starts[i], memory_at(grads[members[i]]), starts[i + 1] - starts[i]);
  });
  return 1;
}

// Lets autograd see that tensors were written. Returns whether that was possible for
// all; a version may be counted twice.
int64_t bump_versions(const int64_t* objects, int64_t offset, int64_t count) {
  try {
    for (int64_t i = 0; i < count; ++i) {
      impl_of(objects[i], offset)->bump_version();
    }
  } catch (...) {
    return 0;
  }
  return 1;
}

// Whether the values of the dicts in a dict are the objects of a list, in order.
int64_t has_values(PyObject* dicts, PyObject* list) {
  if (!PyDict_Check(dicts) || !PyList_Check(list)) {
    return 0;
  }
  const Py_ssize_t count = PyList_GET_SIZE(list);
  Py_ssize_t index = 0;
  Py_ssize_t outer = 0;
  PyObject* dict = nullptr;
  while (PyDict_Next(dicts, &outer, nullptr, &dict)) {
    if (!PyDict_Check(dict)) {
      return 0;
    }
    Py_ssize_t inner = 0;
    PyObject* value = nullptr;
    while (PyDict_Next(dict, &inner, nullptr, &value)) {
      if (index >= count || PyList_GET_ITEM(list, index) != value) {
        return 0;
      }
      ++index;
    }
  }
  return index == count;
}

}  // extern "C"
