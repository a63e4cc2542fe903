#include "cuda/cluster_dispatch.h"

namespace quest {
namespace cuda {

int launch_cluster_float32(const ClusterCall& p, void* stream) {
  return Float32Clusters::launch(p, stream);
}

int active_clusters_float32(const ClusterCall& p, int* count) {
  return Float32Clusters::active(p, count);
}

}  // namespace cuda
}  // namespace quest
