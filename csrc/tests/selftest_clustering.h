// The part of the self-test for points and centres: assignment, its gradients, loss, target and nearest centre.
#pragma once

#include <cstdint>

#include "compare.h"

namespace fastseq {

using Wide = long double;

struct ClusterProblem {
  int N, d, K, threads;
  double alpha;
  Numbers z, centers, target, freq, arriving;

  std::string describe() const {
    char text[120];
    std::snprintf(text, sizeof(text), "clustering N=%d d=%d K=%d alpha=%g threads=%d", N, d, K, alpha, threads);
    return text;
  }
};

struct ClusterResults {
  Numbers q, dz, dcenters, loss, loss_dz, loss_dcenters, freq_loss, freq_dz, freq_dcenters, distance, label_distance, p;
  double mass = 0;  // the sum of all targets; those by frequencies sum to N
  // The largest that the sums of freq_dz and freq_dcenters would be if no p - q were smaller than q.
  double freq_dz_terms = 0, freq_dcenters_terms = 0;
};

inline ClusterProblem draw_cluster_problem(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const double alphas[] = {1, 1, 0.5, 3};
  ClusterProblem c{};
  c.N = 1 + below(below(2) ? 400 : 20), c.d = 1 + below(below(2) ? 90 : 10), c.K = 1 + below(below(2) ? 90 : 10);
  c.threads = 1 + below(4), c.alpha = alphas[below(4)];
  c.z = draw_normal(random, c.N * c.d, 1 / std::sqrt(c.d)), c.centers = draw_normal(random, c.K * c.d, 1);
  c.target = draw_normal(random, c.N * c.K, 1), c.freq = draw_normal(random, c.K, 1);
  for (double& number : c.target) number = number > 0 ? number : 0;
  for (double& number : c.freq) number = static_cast<float>(0.1 + std::abs(number));
  c.arriving = draw_normal(random, c.N * c.K, 1);
  return c;
}

// Straight from the formulas of fastseq/reference/, in the widest type there is: where p is nearly q the terms of the
// loss cancel, and in double this side would be the one that is wrong.
inline ClusterResults by_loops(const ClusterProblem& c) {
  const auto N = static_cast<std::size_t>(c.N), d = static_cast<std::size_t>(c.d), K = static_cast<std::size_t>(c.K);
  ClusterResults r;
  r.q.assign(N * K, 0), r.p.assign(N * K, 0);
  Wide loss = 0, freq_loss = 0;
  Numbers dz_terms(N * d, 0), dcenters_terms(K * d, 0);
  for (Numbers* dz : {&r.dz, &r.loss_dz, &r.freq_dz}) dz->assign(N * d, 0);
  for (Numbers* dcenters : {&r.dcenters, &r.loss_dcenters, &r.freq_dcenters}) dcenters->assign(K * d, 0);
  for (std::size_t i = 0; i < N; ++i) {
    std::vector<Wide> distance(K, 0), sharp(K), assigned(K);
    Wide sum = 0, total = 0, mass = 0, mean = 0;
    for (std::size_t j = 0; j < K; ++j) {
      for (std::size_t k = 0; k < d; ++k) distance[j] += std::pow(Wide(c.z[i * d + k]) - c.centers[j * d + k], 2);
      sum += assigned[j] = std::pow(1 + distance[j] / c.alpha, -(Wide(c.alpha) + 1) / 2);
    }
    for (std::size_t j = 0; j < K; ++j) {
      const Wide q = assigned[j] /= sum;
      r.q[i * K + j] = static_cast<double>(q);
      total += sharp[j] = q * q / c.freq[j];
      mass += c.target[i * K + j], r.mass += c.target[i * K + j];
      mean += q * c.arriving[i * K + j];
    }
    for (std::size_t j = 0; j < K; ++j) {
      const Wide q = assigned[j], p = c.target[i * K + j], own = sharp[j] / total;
      r.p[i * K + j] = static_cast<double>(own);
      if (p > 0) loss += p * std::log(p / q);
      freq_loss += own * std::log(own / q);
      const Wide slope = (c.alpha + 1) / (c.alpha + distance[j]);
      for (std::size_t k = 0; k < d; ++k) {
        const Wide way = slope * (Wide(c.z[i * d + k]) - c.centers[j * d + k]);
        const auto add = [&](Numbers& dz, Numbers& dcenters, Wide weight) {
          dz[i * d + k] += static_cast<double>(weight * way), dcenters[j * d + k] -= static_cast<double>(weight * way);
        };
        add(r.dz, r.dcenters, q * (mean - c.arriving[i * K + j]));
        add(r.loss_dz, r.loss_dcenters, p - q * mass);
        add(r.freq_dz, r.freq_dcenters, own - q);
        const double term = static_cast<double>(q * std::abs(way));
        r.freq_dz_terms = std::max(r.freq_dz_terms, dz_terms[i * d + k] += term);
        r.freq_dcenters_terms = std::max(r.freq_dcenters_terms, dcenters_terms[j * d + k] += term);
      }
    }
    r.distance.push_back(static_cast<double>(*std::min_element(distance.begin(), distance.end())));
  }
  r.loss = {static_cast<double>(loss)}, r.freq_loss = {static_cast<double>(freq_loss)};
  r.label_distance = r.distance;
  return r;
}

template <typename Real>
ClusterResults by_kernels(const KernelTable& table, const ClusterProblem& c) {
  const auto z = as<Real>(c.z), centers = as<Real>(c.centers), target = as<Real>(c.target), freq = as<Real>(c.freq);
  const auto arriving = as<Real>(c.arriving);
  const Storage storage = sizeof(Real) == 8 ? Storage::kFloat64 : Storage::kFloat32;
  ClusterParams params{};
  params.storage = params.given_storage = params.gradient_storage = storage;
  params.N = c.N, params.d = c.d, params.K = c.K, params.alpha = c.alpha, params.scale = 1, params.threads = c.threads;
  params.z = z.data(), params.centers = centers.data();
  ClusterResults r;

  auto q = poisoned<Real>(target.size());
  ClusterParams assign = params;
  assign.task = ClusterTask::kAssign, assign.q = q.data();
  table.cluster(assign);
  r.q = wide(q);

  const auto gradients = [&](ClusterParams task, Numbers& dz_to, Numbers& dcenters_to) {
    auto dz = poisoned<Real>(z.size()), dcenters = poisoned<Real>(centers.size());
    double loss = 0;
    task.dz = dz.data(), task.dcenters = dcenters.data(), task.loss = &loss;
    table.cluster(task);
    dz_to = wide(dz), dcenters_to = wide(dcenters);
    return Numbers{loss};
  };
  ClusterParams backward = params, with_target = params, with_freq = params;
  backward.task = ClusterTask::kAssignBackward, backward.given = arriving.data();
  with_target.task = ClusterTask::kTargetLoss, with_target.given = target.data();
  with_freq.task = ClusterTask::kFrequencyLoss, with_freq.freq = freq.data();
  gradients(backward, r.dz, r.dcenters);
  r.loss = gradients(with_target, r.loss_dz, r.loss_dcenters);
  r.freq_loss = gradients(with_freq, r.freq_dz, r.freq_dcenters);

  std::vector<std::int64_t> labels(static_cast<std::size_t>(c.N), -1);
  auto distance = poisoned<Real>(labels.size());
  NearestParams nearest{};
  nearest.storage = storage, nearest.N = c.N, nearest.d = c.d, nearest.K = c.K, nearest.threads = c.threads;
  nearest.z = z.data(), nearest.centers = centers.data(), nearest.labels = labels.data();
  nearest.distance = distance.data();
  table.nearest(nearest);
  r.distance = wide(distance);
  for (std::size_t i = 0; i < labels.size(); ++i) {
    double sum = 0;
    for (int k = 0; k < c.d; ++k) {
      const double way = c.z[i * static_cast<std::size_t>(c.d) + static_cast<std::size_t>(k)] -
                         c.centers.at(static_cast<std::size_t>(labels[i] * c.d + k));
      sum += way * way;
    }
    r.label_distance.push_back(sum);
  }

  auto p = poisoned<Real>(q.size());
  TargetParams sharpen{};
  sharpen.storage = storage, sharpen.N = c.N, sharpen.K = c.K, sharpen.threads = c.threads;
  sharpen.q = q.data(), sharpen.freq = freq.data(), sharpen.p = p.data();
  table.target(sharpen);
  r.p = wide(p);
  return r;
}

template <typename Real>
bool check(const KernelTable& table, const ClusterProblem& c, const ClusterResults& truth) {
  const double epsilon = static_cast<double>(std::numeric_limits<Real>::epsilon()), bound = 1000 * epsilon;
  const ClusterResults got = by_kernels<Real>(table, c);
  bool right = true;
  const auto compare = [&](const char* name, Numbers ClusterResults::*member, double floor = 0) {
    right = agrees(name, got.*member, truth.*member, bound, c.describe(), table, floor) && right;
  };
  compare("q", &ClusterResults::q), compare("p", &ClusterResults::p);
  compare("dz", &ClusterResults::dz), compare("dcenters", &ClusterResults::dcenters);
  // Where p is nearly q a loss, the sum of p log(p/q), cancels, and so does p - q; but each logarithm and each q is off
  // by some epsilon.
  compare("loss", &ClusterResults::loss, epsilon * truth.mass), compare("dz of the loss", &ClusterResults::loss_dz);
  compare("dcenters of the loss", &ClusterResults::loss_dcenters);
  compare("loss by freq", &ClusterResults::freq_loss, epsilon * c.N);
  compare("dz by freq", &ClusterResults::freq_dz, 4 * epsilon * truth.freq_dz_terms);
  compare("dcenters by freq", &ClusterResults::freq_dcenters, 4 * epsilon * truth.freq_dcenters_terms);
  compare("distance", &ClusterResults::distance), compare("distance to the label", &ClusterResults::label_distance);
  return right;
}

}  // namespace fastseq
