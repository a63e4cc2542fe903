// Operators as torch calls them: TORCH_BOX, with settings that are several arguments of the schema.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "operators.h"

namespace quest {

// Arguments of the schema that make a T.
template <class T>
constexpr uint64_t kNumArguments = 1;
template <>
inline constexpr uint64_t kNumArguments<SummaryFormat> = 3;
template <>
inline constexpr uint64_t kNumArguments<Selection> = 7;
template <>
inline constexpr uint64_t kNumArguments<SparseSettings> = 10;

// The arguments of a call, in their order.
class Stack {
 public:
  explicit Stack(StableIValue* next) : next_(next) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// These are checked.
template <>
GroupReduce Stack::take();
template <>
SummaryFormat Stack::take();
template <>
Selection Stack::take();  // of select_pages
template <>
SparseSettings Stack::take();

template <auto* op>
struct Boxed;

template <class Result, class... Parameters, Result (*op)(Parameters...)>
struct Boxed<op> {
  static void call(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
    constexpr uint64_t kExpected = (kNumArguments<Parameters> + ...);
    QUEST_CHECK(num_arguments == kExpected && num_results == kNumResults,
                "expected an operator with ", kExpected, " arguments and ", kNumResults,
                " results, got ", num_arguments, " and ", num_results,
                ": the native library is of another version than the Python code; build it again, "
                "or set QUEST_COMPILE_NATIVE=0");
    Stack arguments(stack);
    std::tuple<Parameters...> values{arguments.take<Parameters>()...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(op, std::move(values));
    } else if constexpr (kNumResults == 2) {
      torch::stable::detail::box_from_tuple(stack, std::apply(op, std::move(values)));
    } else {
      stack[0] = torch::stable::detail::from(std::apply(op, std::move(values)));
    }
  }

 private:
  static constexpr uint64_t kNumResults = std::is_void_v<Result>                 ? 0
                                          : std::is_same_v<Result, OutputAndLse> ? 2
                                                                                 : 1;
};

// For m.impl(#name, ...) of every operator: QUEST_OPERATORS(QUEST_REGISTER_CPU)
#define QUEST_REGISTER_CPU(result, name, parameters) \
  m.impl(#name, &quest::Boxed<&quest::name>::call);
#define QUEST_REGISTER_CUDA(result, name, parameters) \
  m.impl(#name, &quest::Boxed<&quest::cuda::name>::call);

}  // namespace quest
