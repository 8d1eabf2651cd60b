// Generated when torch is built for CUDA, and the only header that the binding lacks in a torch for the CPU. It says how
// the CUDA parts of torch were linked, which does not matter to a check that the binding compiles.

#pragma once
