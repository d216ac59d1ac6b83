// How tests control the emulation of the CUDA driver; only builds with FUSEDOPT_CUDA=emulated have
// it.
#pragma once

namespace fusedopt::cuda::emulation {

void use(bool emulate);  // it is switched off at first

// Between these, kernels are recorded and not run, as when a stream is captured.
void begin_capture();
void end_capture();
void replay();  // runs what the last capture has recorded

}  // namespace fusedopt::cuda::emulation
