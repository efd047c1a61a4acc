// k2_megatron._cpu: the operations of ops.h, in the best instruction set of this processor, chosen once, on import.
//
// K2_CPU_INSTRUCTION_SET (portable, avx2, avx512) asks for a lesser one, so that tests can compare them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "aes_lanes.h"
#include "bindings.h"

namespace {

enum class InstructionSet { portable, avx2, avx512 };
constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

InstructionSet best_instruction_set() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("aes");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

InstructionSet chosen_instruction_set() {
  const InstructionSet best = best_instruction_set();
  const char* wanted = std::getenv("K2_CPU_INSTRUCTION_SET");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int set = 0; set <= static_cast<int>(best); ++set)
    if (std::string(wanted) == kNames[set]) return static_cast<InstructionSet>(set);
  throw std::runtime_error("K2_CPU_INSTRUCTION_SET is \"" + std::string(wanted) +
                           "\"; this processor allows portable up to " + kNames[static_cast<int>(best)] +
                           ". Unset it to let the module choose.");
}

template <class Function>
Function pick(InstructionSet set, Function portable, [[maybe_unused]] Function avx2, [[maybe_unused]] Function avx512) {
  if (set == InstructionSet::avx512) return avx512;
  if (set == InstructionSet::avx2) return avx2;
  return portable;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  const InstructionSet set = chosen_instruction_set();
  module.doc() = "CPU kernels of k2_megatron (csrc/ops.h): addresses in, nothing checked. Use k2_megatron.kernels.";
  module.attr("instruction_set") = kNames[static_cast<int>(set)];
#ifdef __x86_64__
#define K2_PICK(NAME) pick(set, &k2::cpu::portable::NAME, &k2::cpu::avx2::NAME, &k2::cpu::avx512::NAME)
#else
#define K2_PICK(NAME) &k2::cpu::portable::NAME
#endif
#define K2_BIND(NAME) k2::bind(module, #NAME, K2_PICK(NAME));
  K2_BIND_ALL(K2_BIND)
  K2_BIND_CPU(K2_BIND)
  k2::bind_aes_lanes(module, {K2_PICK(aes_lanes_absorb), K2_PICK(aes_lanes_digest)});
}
