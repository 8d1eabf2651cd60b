// The kernels for a GPU, compiled for the processor, behind functions that Python can call (emulator.py).

#include "fast_weights_kernels.cuh"

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

template <class T>
fwp::gpu::ScanLaunch plan(const fwp::Problem& p, int64_t streams, bool backward, int multiprocessors) {
    return fwp::gpu::plan_scan<T>(streams, p.dk, p.dv, backward, {multiprocessors, 64 * 1024});
}

template <class T>
int scan(const fwp::Problem& p, int64_t streams, bool backward, int multiprocessors) {
    const auto launch = plan<T>(p, streams, backward, multiprocessors);
    const Buffer<T> workspace(launch.workspace);
    return finish(fwp::gpu::launch_scan(p, launch, workspace.get(), nullptr));
}

template <class T>
int step(const fwp::Step& p) {
    const Buffer<int> scratch(p.new_places ? fwp::gpu::Descent::elements(p.rows, p.slots) : 0);
    return finish(fwp::gpu::launch_step<T>(p, scratch.get(), nullptr));
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

// Which of the mistakes that a test has put into the sources is made; 0: none.
int emulator_mistake = 0;
void emulator_make_mistake(int which) { emulator_mistake = which; }

int64_t emulator_bytes(int which) {
    const size_t bytes[] = {sizeof(fwp::Problem), sizeof(fwp::Step), sizeof(fwp::Read)};
    return int64_t(bytes[which]);
}

void emulator_plan(
    const fwp::Problem* p, int64_t streams, int wide, int backward, int multiprocessors, fwp::gpu::ScanLaunch* launch) {
    *launch = wide ? plan<double>(*p, streams, backward, multiprocessors)
                   : plan<float>(*p, streams, backward, multiprocessors);
}

int emulator_scan(const fwp::Problem* p, int64_t streams, int wide, int backward, int multiprocessors) {
    return wide ? scan<double>(*p, streams, backward, multiprocessors)
                : scan<float>(*p, streams, backward, multiprocessors);
}

int emulator_step(const fwp::Step* p, int wide) { return wide ? step<double>(*p) : step<float>(*p); }

int emulator_read(const fwp::Read* p, int wide) {
    return finish(wide ? fwp::gpu::launch_read<double>(*p, nullptr) : fwp::gpu::launch_read<float>(*p, nullptr));
}

}  // extern "C"
