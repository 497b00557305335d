// Which instruction set this process uses.
#include <atomic>
#include <cstring>

#include "bsfa/cpu.h"
#include "kernels.h"

namespace bsfa::cpu {
namespace {

bool supported(const char* name) {
  if (std::strcmp(name, "generic") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return false;
}

const Kernels* table([[maybe_unused]] const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return &avx512_kernels();
  if (std::strcmp(name, "avx2") == 0) return &avx2_kernels();
#endif
  return &generic_kernels();
}

const Kernels* best() {
  static const Kernels* const result = [] {
    for (const char* name : {"avx512", "avx2"}) {
      if (supported(name)) return table(name);
    }
    return table("generic");
  }();
  return result;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = forced.load(std::memory_order_acquire);
  return chosen != nullptr ? *chosen : *best();
}

bool set_instruction_set(const char* name) {
  if (name != nullptr && !supported(name)) return false;
  forced.store(name != nullptr ? table(name) : nullptr, std::memory_order_release);
  return true;
}

const char* instruction_set() { return kernels().name; }

}  // namespace bsfa::cpu
