#include "cuda/cluster_dispatch.h"

namespace quest {
namespace cuda {

int launch_cluster_float16(const ClusterCall& p, void* stream) {
  return Float16Clusters::launch(p, stream);
}

int active_clusters_float16(const ClusterCall& p, int* count) {
  return Float16Clusters::active(p, count);
}

}  // namespace cuda
}  // namespace quest
