// What a gate of linear may be. No torch in here.
#pragma once

namespace sinkattn {

enum class Activation { none, silu, gelu_tanh, gelu };

}  // namespace sinkattn
