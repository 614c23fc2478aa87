// The ops for torch in one source: its headers take longer to compile than all of them.
#include "lif/torch/bn_lif_autograd.cpp"
#include "lif/torch/bn_lif_torch.cpp"
#include "lif/torch/lif_autograd.cpp"
#include "lif/torch/lif_torch.cpp"
#include "spike/spike_torch.cpp"
