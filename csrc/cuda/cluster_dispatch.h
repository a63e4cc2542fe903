// The instances of the one-kernel form of one dtype.
#pragma once

#include "cuda/attend_dispatch.h"
#include "cuda/cluster.h"

namespace quest {
namespace cuda {

template <class T, class Instances>
struct ClusterInstances {
  static int launch(const ClusterCall& p, void* stream) {
    return Instances::visit(p.attend, [&](auto* warp) -> int {
      using W = std::remove_pointer_t<decltype(warp)>;
      const int64_t num_clusters =
          static_cast<int64_t>(p.score.rows.batch) * p.score.summaries.num_kv_heads;
      return launch_clusters(cluster_kernel<T, W>, num_clusters, p.size, kThreads,
                             cluster_shared_bytes<W>(p), p, stream);
    });
  }

  static int active(const ClusterCall& p, int* count) {
    return Instances::visit(p.attend, [&](auto* warp) -> int {
      using W = std::remove_pointer_t<decltype(warp)>;
      return active_clusters(cluster_kernel<T, W>, p.size, kThreads, cluster_shared_bytes<W>(p),
                             count);
    });
  }

  static int64_t bytes(const ClusterCall& p) {
    return Instances::visit(p.attend, [&](auto* warp) -> int64_t {
      return cluster_shared_bytes<std::remove_pointer_t<decltype(warp)>>(p);
    });
  }
};

using Float32Clusters = ClusterInstances<float, Float32Instances>;
using BFloat16Clusters = ClusterInstances<BFloat16, BFloat16Instances>;
using Float16Clusters = ClusterInstances<Float16, Float16Instances>;

int launch_cluster_float32(const ClusterCall& p, void* stream);
int launch_cluster_bfloat16(const ClusterCall& p, void* stream);
int launch_cluster_float16(const ClusterCall& p, void* stream);
int active_clusters_float32(const ClusterCall& p, int* count);
int active_clusters_bfloat16(const ClusterCall& p, int* count);
int active_clusters_float16(const ClusterCall& p, int* count);

}  // namespace cuda
}  // namespace quest
