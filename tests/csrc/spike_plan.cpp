// Reads convolutions and numbers of threads from its input, prints their plans.
#include "spike/spike_plan.h"

#include <iostream>

int main() {
  using namespace iirsnn::sparse;
  Conv c{};
  int64_t threads = 0;
  while (std::cin >> c.images >> c.channels >> c.height >> c.width >> c.outputs >> c.out_height >> c.out_width >>
         c.groups >> c.kernel_h >> c.kernel_w >> c.stride_h >> c.stride_w >> c.padding_h >> c.padding_w >>
         c.dilation_h >> c.dilation_w >> threads) {
    const ForwardPlan forward = forward_plan(c, threads);
    const GradPlan grad = grad_plan(c);
    for (const int64_t number :
         {forward.block, forward.blocks, forward.images, forward.image_chunks, forward.rows, forward.row_chunks,
          forward.tiles, forward.tile_parts, forward.units(), grad.blocks, grad.left, grad.pitch, grad.images,
          grad.units, grad.rows, grad.tiles, weight_grad_splits(c, threads)}) {
      std::cout << number << ' ';
    }
    std::cout << '\n';
  }
}
