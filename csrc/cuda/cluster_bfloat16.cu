#include "cuda/cluster_dispatch.h"

namespace quest {
namespace cuda {

int launch_cluster_bfloat16(const ClusterCall& p, void* stream) {
  return BFloat16Clusters::launch(p, stream);
}

int active_clusters_bfloat16(const ClusterCall& p, int* count) {
  return BFloat16Clusters::active(p, count);
}

}  // namespace cuda
}  // namespace quest
