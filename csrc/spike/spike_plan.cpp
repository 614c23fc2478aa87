#include "spike/spike_plan.h"

#include <algorithm>

namespace iirsnn::sparse {

ForwardPlan forward_plan(const Conv& conv, int64_t threads) {
  ForwardPlan plan;
  const int64_t fit = kCached / kRowBytes / conv.kernel_w / kWord * kWord;
  plan.block = std::min(std::max<int64_t>(fit, kWord), round_up(conv.group_channels(), kWord));
  plan.blocks = ceil_div(conv.group_channels(), plan.block);
  const int64_t positions = conv.out_height * conv.out_width;
  plan.images = std::max<int64_t>(1, std::min(kChunk / positions, conv.images));
  plan.rows =
      plan.images > 1 ? conv.out_height : std::min(conv.out_height, std::max<int64_t>(1, kChunk / conv.out_width));
  plan.image_chunks = ceil_div(conv.images, plan.images);
  plan.row_chunks = ceil_div(conv.out_height, plan.rows);
  plan.tiles = conv.groups * ceil_div(conv.group_outputs(), kTile);
  const int64_t wanted = threads == 1 ? 1 : 3 * threads, chunks = plan.image_chunks * plan.row_chunks;
  plan.tile_parts = std::min(plan.tiles, std::max<int64_t>(1, wanted / chunks));
  return plan;
}

GradPlan grad_plan(const Conv& conv) {
  GradPlan plan;
  plan.blocks = ceil_div(conv.group_channels(), kGradBlock);
  const int64_t first = floor_div(conv.padding_w - (conv.kernel_w - 1) * conv.dilation_w, conv.stride_w);
  const int64_t last = floor_div(conv.width - 1 + conv.padding_w, conv.stride_w);
  plan.left = std::max<int64_t>({0, -first, last - (conv.out_width - 1)});
  plan.pitch = conv.out_width + plan.left;
  const int64_t fit = kCached / kRowBytes;
  plan.images = std::max<int64_t>(1, std::min(fit / (conv.out_height * plan.pitch), conv.images));
  plan.units = ceil_div(conv.images, plan.images);
  plan.rows = plan.images > 1 ? conv.out_height : std::min(conv.out_height, std::max<int64_t>(1, fit / plan.pitch));
  plan.tiles = ceil_div(conv.group_outputs(), kTile);
  return plan;
}

int64_t forward_units(const Forward& work, int64_t threads) { return forward_plan(work.conv, threads).units(); }

int64_t weight_grad_splits(const Conv& conv, int64_t threads) {
  const GradPlan plan = grad_plan(conv);
  const int64_t blocks = conv.groups * plan.blocks;
  int64_t splits = 1;
  while (blocks * splits % threads && blocks * splits < 4 * threads) ++splits;
  return std::max<int64_t>(1, std::min(splits, plan.units));
}

int64_t weight_grad_floats(const Conv& conv) {
  const GradPlan plan = grad_plan(conv);
  return conv.groups * plan.blocks * plan.tiles * kGradBlock * conv.kernel_h * conv.kernel_w * kTile;
}

int64_t weight_grad_units(const WeightGrad& work) {
  return work.splits * work.conv.groups * grad_plan(work.conv).blocks;
}

int64_t weight_grad_finish_units(const WeightGrad& work) {
  const GradPlan plan = grad_plan(work.conv);
  return work.splits > 1 ? work.conv.groups * plan.blocks * plan.tiles : 0;
}

}  // namespace iirsnn::sparse
