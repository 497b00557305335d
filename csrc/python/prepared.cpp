// Dense calls that have been prepared: from Python straight to their launch.
//
// At 1K tokens torch's dispatcher, the conversion of arguments and the tensor maps take the host longer than the kernel
// takes the device. A prepared call (operator prepare_dense) needs four addresses and a stream. Here it is found by
// what q, k and v look like: shapes, strides, dtype, device, and the options. Their addresses come through the table of
// C functions that torch offers for DLPack, the result from torch.empty_like.
//
// Whatever else may have a say in what an operator does sends the call there instead: a Tensor of a subclass, that
// requires grad, or that is a view with its signs turned, and any of the states that `idle` asks for (modes, tracing,
// profiling). So does an error.
//
// Plain C API of Python: pybind11 would take longer than all of this.
#include "prepared.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace bsfa {
namespace {

// --- DLPack 1.x, the part of its C interface that is used here -------------------------------------------------------

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchange {
  uint32_t major, minor;
  void* older;
  void* not_used[3];
  int (*view)(PyObject* tensor, DLTensor* out);  // may be null
  void* current_work_stream;
};

// --- Prepared calls --------------------------------------------------------------------------------------------------

constexpr int kDims = 4;
constexpr int kTensors = 3;  // q, k, v

// What a call is found by.
struct Key {
  struct Dense {
    int64_t sizes[kTensors][kDims], strides[kTensors][kDims];
    int64_t device;
    int64_t dtype;    // code, bits, lanes
    int64_t options;  // causal, whether a scale is given
    double softmax_scale, softcap;
  };
  static_assert(sizeof(Dense) % sizeof(uint64_t) == 0);
  std::array<uint64_t, sizeof(Dense) / sizeof(uint64_t)> words;

  explicit Key(const Dense& dense) { std::memcpy(words.data(), &dense, sizeof(dense)); }
  bool operator==(const Key& other) const { return words == other.words; }
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const uint64_t word : key.words) hash = (hash ^ word ^ hash >> 29) * 0x9e3779b97f4a7c15u;
    return static_cast<size_t>(hash ^ hash >> 32);
  }
};

// Runs a prepared call on q, k, v, out (run_prepared in csrc/torch/cuda_ops.cpp); 0 if it did.
using Runner = int (*)(const void* prepared, void* const* tensors);
using Bytes = std::vector<unsigned char>;

// All that is used under the GIL.
struct State {
  Runner runner = nullptr;
  int32_t device_type = 0;
  PyTypeObject* tensor_type = nullptr;
  const DLPackExchange* exchange = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* contiguous = nullptr;  // torch.contiguous_format
  PyObject* idle = nullptr;        // functions without arguments; nothing is going on if all of them give what is false
  PyObject* memory_format = nullptr;  // ("memory_format",)
  PyObject* requires_grad = nullptr;  // names
  PyObject* is_neg = nullptr;
  std::unordered_map<Key, std::shared_ptr<const Bytes>, Hash> calls;
};

State& state() {
  static State& only = *new State;  // never freed: Python may be gone by then
  return only;
}

// Whether nothing but the kernel has a say in a call. Errors are forgotten: the operator finds them again.
bool is_idle(const State& s) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(s.idle); ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GET_ITEM(s.idle, i));
    const int busy = answer == nullptr ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (busy < 0) PyErr_Clear();
    if (busy != 0) return false;
  }
  return true;
}

bool is_false(PyObject* answer) {
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

// A tensor of `state`'s kind, without a look at its shape.
bool view(const State& s, PyObject* tensor, DLTensor* out) {
  if (Py_TYPE(tensor) != s.tensor_type) return false;
  if (s.exchange->view(tensor, out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out->device_type != s.device_type || out->ndim != kDims || out->data == nullptr) return false;
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

bool read_tensors(const State& s, PyObject* const* tensors, Key::Dense* dense, void** data) {
  for (int i = 0; i < kTensors; ++i) {
    DLTensor t;
    if (!view(s, tensors[i], &t)) return false;
    if (!is_false(PyObject_GetAttr(tensors[i], s.requires_grad))) return false;
    if (!is_false(PyObject_CallMethodNoArgs(tensors[i], s.is_neg))) return false;
    const int64_t dtype = int64_t{t.dtype_code} << 32 | int64_t{t.dtype_bits} << 16 | t.dtype_lanes;
    if (i == 0) {
      dense->device = t.device_id;
      dense->dtype = dtype;
    }
    if (dense->device != t.device_id || dense->dtype != dtype) return false;
    std::memcpy(dense->sizes[i], t.shape, sizeof(dense->sizes[i]));
    std::memcpy(dense->strides[i], t.strides, sizeof(dense->strides[i]));
    data[i] = t.data;
  }
  return true;
}

// Whether q is laid out as its result will be; then empty_like need not be told, which takes it a tenth longer.
bool is_contiguous(const Key::Dense& dense) {
  int64_t stride = 1;
  for (int i = kDims - 1; i >= 0; stride *= dense.sizes[0][i--]) {
    if (dense.strides[0][i] != stride) return false;
  }
  return true;
}

// causal, softmax_scale, softcap: exactly bool, float or None, float.
bool read_options(PyObject* const* options, Key::Dense* dense) {
  if (!PyBool_Check(options[0]) || !PyFloat_CheckExact(options[2])) return false;
  const bool scaled = options[1] != Py_None;
  if (scaled && !PyFloat_CheckExact(options[1])) return false;
  dense->options = (options[0] == Py_True ? 1 : 0) | (scaled ? 2 : 0);
  dense->softmax_scale = scaled ? PyFloat_AS_DOUBLE(options[1]) : 0.0;
  dense->softcap = PyFloat_AS_DOUBLE(options[2]);
  return true;
}

bool read_call(const State& s, PyObject* const* arguments, Key::Dense* dense, void** data) {
  return s.runner != nullptr && read_options(arguments + kTensors, dense) && is_idle(s) &&
         read_tensors(s, arguments, dense, data);
}

constexpr Py_ssize_t kArguments = 6;  // of a call

bool check_count(Py_ssize_t count, Py_ssize_t want) {
  if (count == want) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, %zd are given", want, count);
  return false;
}

PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count(count, kArguments)) return nullptr;
  const State& s = state();
  Key::Dense dense;
  void* data[kTensors + 1];
  if (!read_call(s, arguments, &dense, data)) Py_RETURN_NONE;
  const auto found = s.calls.find(Key(dense));
  if (found == s.calls.end()) Py_RETURN_NONE;
  const std::shared_ptr<const Bytes> prepared = found->second;  // other threads may forget it
  PyObject* const like[] = {arguments[0], s.contiguous};
  PyObject* out = PyObject_Vectorcall(s.empty_like, like, 1, is_contiguous(dense) ? nullptr : s.memory_format);
  if (out == nullptr) return nullptr;  // out of memory
  DLTensor result;
  bool done = view(s, out, &result);
  if (done) {
    data[kTensors] = result.data;
    const Runner runner = s.runner;
    Py_BEGIN_ALLOW_THREADS;  // a launch waits where the device's queue is full
    done = runner(prepared->data(), data) == 0;
    Py_END_ALLOW_THREADS;
  }
  if (done) return out;
  Py_DECREF(out);
  Py_RETURN_NONE;
}

// (the arguments of run(), address of the prepared bytes, their number) -> whether it is remembered.
PyObject* remember(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count(count, kArguments + 2)) return nullptr;
  const void* bytes = PyLong_AsVoidPtr(arguments[kArguments]);
  const Py_ssize_t size = PyLong_AsSsize_t(arguments[kArguments + 1]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  State& s = state();
  Key::Dense dense;
  void* data[kTensors];
  if (size <= 0 || !read_call(s, arguments, &dense, data)) Py_RETURN_FALSE;
  if (dense.sizes[2][kDims - 1] != dense.sizes[0][kDims - 1]) Py_RETURN_FALSE;  // the result is like q
  const auto* from = static_cast<const unsigned char*>(bytes);
  try {
    s.calls[Key(dense)] = std::make_shared<const Bytes>(from, from + size);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_TRUE;
}

PyObject* forget(PyObject*, PyObject*) {
  state().calls.clear();
  Py_RETURN_NONE;
}

PyObject* idle(PyObject*, PyObject*) { return PyBool_FromLong(state().runner != nullptr && is_idle(state()) ? 1 : 0); }

// (address of the runner, DLPack's device type, torch.Tensor, its table of DLPack functions, torch.empty_like,
// torch.contiguous_format, tuple of functions) -> whether the table is one that run() can use.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count(count, 7)) return nullptr;
  void* runner = PyLong_AsVoidPtr(arguments[0]);
  const long device_type = PyLong_AsLong(arguments[1]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (!PyType_Check(arguments[2]) || !PyTuple_Check(arguments[6])) {
    PyErr_SetString(PyExc_TypeError, "a type and a tuple are wanted");
    return nullptr;
  }
  const auto* exchange = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(arguments[3], "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  State& s = state();
  s.calls.clear();
  s.runner = nullptr;
  if (runner == nullptr || exchange->major != 1 || exchange->view == nullptr) Py_RETURN_FALSE;
  s.device_type = static_cast<int32_t>(device_type);
  s.exchange = exchange;
  const auto keep = [](auto*& slot, PyObject* object) {
    Py_INCREF(object);
    auto* before = reinterpret_cast<PyObject*>(slot);
    slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(object);
    Py_XDECREF(before);
  };
  keep(s.tensor_type, arguments[2]);
  keep(s.empty_like, arguments[4]);
  keep(s.contiguous, arguments[5]);
  keep(s.idle, arguments[6]);
  s.runner = reinterpret_cast<Runner>(runner);
  Py_RETURN_TRUE;
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"prepared_connect", as_method(&connect), METH_FASTCALL,
     "What prepared calls need of torch and of the CUDA library."},
    {"prepared_idle", &idle, METH_NOARGS, "Whether calls may be prepared and run now."},
    {"prepared_remember", as_method(&remember), METH_FASTCALL, "Keep a prepared call for arguments like these."},
    {"prepared_run", as_method(&run), METH_FASTCALL,
     "Run the call that was prepared for such arguments; None: did not."},
    {"prepared_forget", &forget, METH_NOARGS, "Forget all prepared calls."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_prepared(PyObject* module) {
  State& s = state();
  s.requires_grad = PyUnicode_InternFromString("requires_grad");
  s.is_neg = PyUnicode_InternFromString("is_neg");
  s.memory_format = Py_BuildValue("(s)", "memory_format");
  return s.requires_grad != nullptr && s.is_neg != nullptr && s.memory_format != nullptr &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bsfa
