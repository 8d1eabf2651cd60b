// The kernels for a GPU, compiled for the processor, behind functions that Python can call (emulator.py).

#include "fast_weights_cuda_kernels.cu"

namespace {

std::string message;

// As the drivers of a GPU say it: 0, or the number of an error.
int finish(cudaError_t error) {
    message = emulated::machine().error;
    emulated::machine().error.clear();
    return error;
}

// What the binding allocates: of its exact size, and filled with NaN.
template <class T>
struct Buffer {
    explicit Buffer(int64_t count) : elements(count ? new T[count] : nullptr) {
        if (count) std::memset(static_cast<void*>(elements.get()), 0xff, count * sizeof(T));
    }
    std::unique_ptr<T[]> elements;
    T* get() const { return elements.get(); }
};

constexpr fwp::gpu::Device device_with(int multiprocessors) { return {multiprocessors, 64 * 1024}; }

template <class T>
int scan(const fwp::Problem& p, int64_t streams, bool wide, bool backward, int multiprocessors) {
    const auto launch = fwp::gpu::plan_scan(p, streams, wide, backward, device_with(multiprocessors));
    const Buffer<T> workspace(launch.workspace);
    return finish(fwp::gpu::scan(p, launch, wide, backward, workspace.get(), nullptr));
}

}  // namespace

extern "C" {

const char* emulator_error() { return message.c_str(); }
void emulator_seed(uint64_t seed) { emulated::machine().draw.seed(seed); }

// Leaves out the barrier in a line of a file; line 0: none.
void emulator_leave_out(const char* file, int line) {
    static std::string kept;
    kept = file;
    emulated::machine().missing_file = kept.c_str();
    emulated::machine().missing_line = line;
}

void emulator_make_mistake(int which) { emulated::mistake_made = which; }

int64_t emulator_bytes(int which) {
    const size_t bytes[] = {sizeof(fwp::Problem), sizeof(fwp::Step), sizeof(fwp::Read)};
    return int64_t(bytes[which]);
}

void emulator_plan(
    const fwp::Problem* p, int64_t streams, int wide, int backward, int multiprocessors, fwp::gpu::ScanLaunch* launch) {
    *launch = fwp::gpu::plan_scan(*p, streams, wide, backward, device_with(multiprocessors));
}

int emulator_scan(const fwp::Problem* p, int64_t streams, int wide, int backward, int multiprocessors) {
    return wide ? scan<double>(*p, streams, true, backward, multiprocessors)
                : scan<float>(*p, streams, false, backward, multiprocessors);
}

int emulator_step(const fwp::Step* p, int wide) {
    const Buffer<int> scratch(fwp::gpu::step_scratch(*p));
    return finish(fwp::gpu::step(*p, wide, scratch.get(), nullptr));
}

int emulator_read(const fwp::Read* p, int wide) { return finish(fwp::gpu::read(*p, wide, nullptr)); }

}  // extern "C"
