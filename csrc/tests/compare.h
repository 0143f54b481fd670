// What the parts of the self-test share: numbers as the kernels take them, and the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../cpu/params.h"

namespace fastseq {

using Numbers = std::vector<double>;

template <typename Real>
std::vector<Real> as(const Numbers& from) {
  return std::vector<Real>(from.begin(), from.end());
}
template <typename Real>
Numbers wide(const std::vector<Real>& from) {
  return Numbers(from.begin(), from.end());
}
// What no kernel may leave unwritten.
template <typename Real>
std::vector<Real> poisoned(std::size_t count) {
  return std::vector<Real>(count, std::numeric_limits<Real>::quiet_NaN());
}

// Normal numbers that float can hold.
inline Numbers draw_normal(std::mt19937& random, int count, double scale) {
  std::normal_distribution<double> normal;
  Numbers numbers(count);
  for (double& number : numbers) number = static_cast<float>(scale * normal(random));
  return numbers;
}

// floor: what an error may be however small the numbers are.
inline bool agrees(const char* name, const Numbers& got, const Numbers& truth, double bound, const std::string& problem,
                   const KernelTable& table, double floor = 0) {
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    const double difference = std::abs(got[i] - truth[i]);
    if (!(difference <= error)) error = difference;  // a NaN is taken too
    largest = std::max(largest, std::abs(truth[i]));
  }
  if (error <= bound * largest + floor) return true;
  std::printf("MISMATCH %s: %s of %s: error %.3g, largest %.3g\n", table.name, name, problem.c_str(), error, largest);
  return false;
}

}  // namespace fastseq
