// As std::numbers of C++20.
#pragma once

namespace quest {

template <class T>
constexpr T kLog2e = T(1.4426950408889634);
template <class T>
constexpr T kLn2 = T(0.6931471805599453);

}  // namespace quest
