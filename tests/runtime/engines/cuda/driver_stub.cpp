// A CUDA driver on the CPU, to be found as libcuda.so.1: what bar-edge calls of it through cuda-bindings, and no more.
//
// One GPU of SM 9.0 with 1 GiB. What is put into a stream is done at once, what is captured when its graph is launched.
// Kernels are those of the libraries that host.py makes, named in BAR_EDGE_STUB_KERNELS (colons between), if the loaded
// cubin has them too. Wrong use is answered as CUDA answers it, or sooner where CUDA tells at the next synchronization. A
// kernel that leaves an allocation, or uses a freed one, is a segmentation fault. On the clock of events a kernel and a
// copy on the device take a millisecond, everything else takes no time.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    SHARED_OBJECT_INIT_FAILED = 303,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_WRONG_THREAD = 908,
};

using Handle = void*;
using Address = unsigned long long;
using Work = std::function<Result()>;
using Kernel = void (*)(unsigned grid, unsigned block, void** arguments);

constexpr unsigned SM = 90, MULTIPROCESSORS = 132, MOST_THREADS = 1024;
constexpr size_t MEMORY = size_t(1) << 30, ALIGNMENT = 256, PAGE = 4096;
constexpr unsigned char GARBAGE = 0xA5;  // what fresh memory holds, and what is behind it

// Objects by handles that are never given twice, so that one which was destroyed is known to be.
uintptr_t last_handle = 0x1000;

template <typename T>
struct Objects {
    std::map<Handle, T> held;
    Handle add(T object) {
        const Handle handle = reinterpret_cast<Handle>(last_handle += 0x10);
        held.emplace(handle, std::move(object));
        return handle;
    }
    T* find(Handle handle) {
        const auto found = held.find(handle);
        return found == held.end() ? nullptr : &found->second;
    }
    Result destroy(Handle handle) { return held.erase(handle) ? SUCCESS : INVALID_HANDLE; }
};

struct Capture {
    std::vector<Work> work;
    std::thread::id thread;
    bool relaxed, valid = true;
};

struct Stream {
    std::optional<Capture> capture;
};

struct Function {
    Handle module;
    Kernel kernel;
    std::string parameters;  // numpy's codes, of host.py
};

struct Block {
    char* mapping;
    size_t size, mapped;
};

std::mutex mutex;
bool initialized = false;
std::vector<void*> libraries;
Handle primary = nullptr;
unsigned retained = 0;
thread_local std::vector<Handle> contexts;
std::map<Address, Block> memory;
size_t allocated = 0;
Objects<Stream> streams;
Objects<std::vector<Work>> graphs, executables;
Objects<std::optional<double>> events;  // when each was recorded
Objects<std::string> modules;
Objects<Function> functions;
double clock_ms = 0;

// -- what is asked of arguments --------------------------------------------------------------------------------------

bool in_context() { return !contexts.empty() && contexts.back() == primary && retained; }

// Whether memory from an address on is allocated; `size` 0 asks for the address alone.
bool is_held(Address address, size_t size) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    const auto& [begin, block] = *--after;
    const size_t offset = address - begin;
    return offset < block.size && size <= block.size - offset;
}

// The default streams are never captured.
Stream* find_stream(Handle handle) {
    static Stream standard;
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? &standard : streams.find(handle);
}

// What may not happen while this thread captures: it ends the capture, too.
Result unsafe() {
    Result result = SUCCESS;
    for (auto& [handle, stream] : streams.held)
        if (stream.capture && !stream.capture->relaxed && stream.capture->thread == std::this_thread::get_id()) {
            stream.capture->valid = false;
            result = STREAM_CAPTURE_UNSUPPORTED;
        }
    return result;
}

Result enqueue(Handle handle, Work work) {
    Stream* stream = find_stream(handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture) return work();
    if (!stream->capture->valid) return STREAM_CAPTURE_INVALIDATED;
    stream->capture->work.push_back(std::move(work));
    return SUCCESS;
}

Result run(const std::vector<Work>& all) {
    for (const Work& work : all)
        if (const Result result = work()) return result;
    return SUCCESS;
}

// -- device and context ----------------------------------------------------------------------------------------------

Result init(unsigned flags) {
    if (flags) return INVALID_VALUE;
    const char* paths = std::getenv("BAR_EDGE_STUB_KERNELS");
    std::istringstream all(paths && !initialized ? paths : "");
    for (std::string path; std::getline(all, path, ':');)
        if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL))
            libraries.push_back(library);
        else
            return std::fprintf(stderr, "%s\n", dlerror()), SHARED_OBJECT_INIT_FAILED;
    initialized = true;
    return SUCCESS;
}

Result driver_get_version(int* version) { return *version = 13000, SUCCESS; }

Result device_get(int* device, int ordinal) { return ordinal ? INVALID_DEVICE : (*device = 0, SUCCESS); }

Result device_get_attribute(int* value, int attribute, int device) {
    const std::map<int, int> known = {{16, MULTIPROCESSORS}, {75, SM / 10}, {76, SM % 10}};
    if (device) return INVALID_DEVICE;
    if (!known.count(attribute)) return INVALID_VALUE;
    return *value = known.at(attribute), SUCCESS;
}

Result primary_retain(Handle* context, int device) {
    if (device) return INVALID_DEVICE;
    if (!retained++) primary = reinterpret_cast<Handle>(last_handle += 0x10);
    return *context = primary, SUCCESS;
}

Result primary_release(int device) {
    if (device) return INVALID_DEVICE;
    return retained ? (--retained, SUCCESS) : INVALID_CONTEXT;
}

Result context_get(Handle* context) { return *context = contexts.empty() ? nullptr : contexts.back(), SUCCESS; }

Result context_push(Handle context) {
    if (!retained || context != primary) return INVALID_CONTEXT;
    return contexts.push_back(context), SUCCESS;
}

Result context_pop(Handle* context) {
    if (contexts.empty()) return INVALID_CONTEXT;
    if (context) *context = contexts.back();
    return contexts.pop_back(), SUCCESS;
}

Result context_set(Handle context) {
    if (context && (!retained || context != primary)) return INVALID_CONTEXT;
    if (!contexts.empty()) contexts.pop_back();
    if (context) contexts.push_back(context);
    return SUCCESS;
}

Result context_device(int* device) { return *device = 0, SUCCESS; }

Result context_synchronize() { return unsafe(); }

// -- memory ----------------------------------------------------------------------------------------------------------

// At the end of its pages, with one behind it that nobody may touch: what is left over up to there is looked at by `free`.
Result allocate(Address* address, size_t size) {
    if (const Result result = unsafe()) return result;
    if (!size) return INVALID_VALUE;
    const size_t padded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, mapped = (padded + PAGE - 1) / PAGE * PAGE;
    if (padded > MEMORY - allocated) return OUT_OF_MEMORY;
    void* found = mmap(nullptr, mapped + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return OUT_OF_MEMORY;
    char* mapping = static_cast<char*>(found);
    mprotect(mapping + mapped, PAGE, PROT_NONE);
    char* begin = mapping + mapped - padded;
    std::memset(begin, GARBAGE, padded);
    *address = reinterpret_cast<Address>(begin);
    memory[*address] = {mapping, size, mapped};
    allocated += padded;
    return SUCCESS;
}

// Its pages are never given again.
Result free_memory(Address address) {
    if (const Result result = unsafe()) return result;
    const auto found = memory.find(address);
    if (found == memory.end()) return INVALID_VALUE;
    const Block block = found->second;
    const auto* end = reinterpret_cast<const unsigned char*>(block.mapping + block.mapped);
    bool overrun = false;
    for (const auto* behind = reinterpret_cast<const unsigned char*>(address) + block.size; behind < end; ++behind)
        overrun |= *behind != GARBAGE;
    allocated -= size_t(end - reinterpret_cast<const unsigned char*>(address));
    madvise(block.mapping, block.mapped, MADV_DONTNEED);
    mprotect(block.mapping, block.mapped, PROT_NONE);
    memory.erase(found);
    return overrun ? ILLEGAL_ADDRESS : SUCCESS;
}

Result memory_info(size_t* free, size_t* total) { return *free = MEMORY - allocated, *total = MEMORY, SUCCESS; }

Result fill(Address target, unsigned char value, size_t size, Handle stream) {
    if (!is_held(target, size)) return INVALID_VALUE;
    return enqueue(stream, [=] {
        if (!is_held(target, size)) return ILLEGAL_ADDRESS;
        return std::memset(reinterpret_cast<void*>(target), value, size), SUCCESS;
    });
}

// To and from memory of the host, which may be gone before a captured copy runs.
Result copy_host(void* target, const void* source, Address on_device, size_t size, Handle handle) {
    const Stream* stream = find_stream(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return unsafe(), STREAM_CAPTURE_UNSUPPORTED;
    if (!is_held(on_device, size)) return INVALID_VALUE;
    return std::memcpy(target, source, size), SUCCESS;
}

Result copy_in(Address target, const void* source, size_t size, Handle stream) {
    return copy_host(reinterpret_cast<void*>(target), source, target, size, stream);
}

Result copy_out(void* target, Address source, size_t size, Handle stream) {
    return copy_host(target, reinterpret_cast<const void*>(source), source, size, stream);
}

Result copy_in_and_wait(Address target, const void* source, size_t size) {
    const Result result = unsafe();
    return result ? result : copy_in(target, source, size, nullptr);
}

Result copy_out_and_wait(void* target, Address source, size_t size) {
    const Result result = unsafe();
    return result ? result : copy_out(target, source, size, nullptr);
}

Result copy_inside(Address target, Address source, size_t size, Handle stream) {
    if (!is_held(target, size) || !is_held(source, size)) return INVALID_VALUE;
    return enqueue(stream, [=] {
        if (!is_held(target, size) || !is_held(source, size)) return ILLEGAL_ADDRESS;
        clock_ms += 1;
        return std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), size), SUCCESS;
    });
}

// -- streams, captures, events ---------------------------------------------------------------------------------------

Result stream_create(Handle* stream, unsigned flags) {
    return flags > 1 ? INVALID_VALUE : (*stream = streams.add({}), SUCCESS);
}

Result stream_destroy(Handle stream) { return streams.destroy(stream); }

Result stream_synchronize(Handle handle) {
    Stream* stream = find_stream(handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture) return SUCCESS;
    stream->capture->valid = false;
    return STREAM_CAPTURE_UNSUPPORTED;
}

Result begin_capture(Handle handle, int mode) {
    Stream* stream = find_stream(handle);
    if (!stream) return INVALID_HANDLE;
    if (!streams.find(handle)) return STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture || mode < 0 || mode > 2) return INVALID_VALUE;
    stream->capture = Capture{{}, std::this_thread::get_id(), mode == 2};
    return SUCCESS;
}

Result end_capture(Handle handle, Handle* graph) {
    Stream* stream = streams.find(handle);
    *graph = nullptr;
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture) return STREAM_CAPTURE_UNMATCHED;
    if (!stream->capture->relaxed && stream->capture->thread != std::this_thread::get_id())
        return STREAM_CAPTURE_WRONG_THREAD;
    const Capture capture = *std::exchange(stream->capture, std::nullopt);
    if (!capture.valid) return STREAM_CAPTURE_INVALIDATED;
    return *graph = graphs.add(capture.work), SUCCESS;
}

Result graph_instantiate(Handle* executable, Handle graph, unsigned long long flags) {
    const std::vector<Work>* work = graphs.find(graph);
    if (!work || flags) return INVALID_VALUE;
    return *executable = executables.add(*work), SUCCESS;
}

Result graph_launch(Handle executable, Handle stream) {
    const std::vector<Work>* work = executables.find(executable);
    return work ? enqueue(stream, [all = *work] { return run(all); }) : INVALID_VALUE;
}

Result graph_destroy(Handle graph) { return graphs.destroy(graph) ? INVALID_VALUE : SUCCESS; }

Result executable_destroy(Handle executable) { return executables.destroy(executable) ? INVALID_VALUE : SUCCESS; }

Result event_create(Handle* event, unsigned flags) {
    return flags ? INVALID_VALUE : (*event = events.add({}), SUCCESS);
}

Result event_record(Handle event, Handle stream) {
    if (!events.find(event)) return INVALID_HANDLE;
    return enqueue(stream, [=] { return *events.find(event) = clock_ms, SUCCESS; });
}

Result event_synchronize(Handle event) { return events.find(event) ? SUCCESS : INVALID_HANDLE; }

Result event_elapsed(float* milliseconds, Handle begin, Handle end) {
    const auto *first = events.find(begin), *last = events.find(end);
    if (!first || !last || !*first || !*last) return INVALID_HANDLE;
    return *milliseconds = float(**last - **first), SUCCESS;
}

Result event_destroy(Handle event) { return events.destroy(event); }

// -- kernels ---------------------------------------------------------------------------------------------------------

Result module_load(Handle* module, const void* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_machine != EM_CUDA) return INVALID_IMAGE;
    if ((header.e_flags & 0xff) != SM && (header.e_flags >> 8 & 0xff) != SM) return NO_BINARY_FOR_GPU;
    const size_t size = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
    return *module = modules.add(std::string(static_cast<const char*>(image), size)), SUCCESS;
}

Result module_unload(Handle module) {
    std::erase_if(functions.held, [=](const auto& entry) { return entry.second.module == module; });
    return modules.destroy(module);
}

Result module_get_function(Handle* function, Handle module, const char* name) {
    const std::string *image = modules.find(module), text = std::string(".text.") + name;
    if (!image) return INVALID_HANDLE;
    if (image->find(text.c_str(), 0, text.size() + 1) == std::string::npos) return NOT_FOUND;
    for (void* library : libraries) {
        void* const kernel = dlsym(library, (std::string("launch_") + name).c_str());
        void* const describe = dlsym(library, (std::string("parameters_") + name).c_str());
        if (!kernel || !describe) continue;
        const char* const parameters = reinterpret_cast<const char* (*)()>(describe)();
        return *function = functions.add({module, reinterpret_cast<Kernel>(kernel), parameters}), SUCCESS;
    }
    return NOT_FOUND;
}

// The arguments are copied before it returns, as CUDA does it.
Result launch_kernel(Handle handle, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                     unsigned block_z, unsigned shared_bytes, Handle stream, void** arguments, void** extra) {
    const Function* const function = functions.find(handle);
    if (!function) return INVALID_HANDLE;
    const bool flat = grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1;
    if (!flat || !grid || grid > INT32_MAX || !block || block > MOST_THREADS) return INVALID_VALUE;
    if (shared_bytes || extra || !arguments) return INVALID_VALUE;
    std::vector<uint64_t> values;
    std::vector<size_t> pointers;
    std::istringstream codes(function->parameters);
    for (std::string code; codes >> code;) {
        const bool is_pointer = code[0] == '*';
        if (is_pointer) pointers.push_back(values.size());
        values.push_back(0);
        std::memcpy(&values.back(), arguments[values.size() - 1], is_pointer ? 8 : code[1] - '0');
    }
    return enqueue(stream, [=, kernel = function->kernel]() mutable {
        for (const size_t i : pointers)
            if (values[i] && !is_held(values[i], 0)) return ILLEGAL_ADDRESS;
        std::vector<void*> addresses;
        for (uint64_t& value : values) addresses.push_back(&value);
        clock_ms += 1;
        return kernel(grid, block, addresses.data()), SUCCESS;
    });
}

// -- how it is found -------------------------------------------------------------------------------------------------

enum Needs { NOTHING, INITIALIZED, CONTEXT };

template <auto function, Needs needs>
struct Guarded;

template <typename... Arguments, Result (*function)(Arguments...), Needs needs>
struct Guarded<function, needs> {
    static Result call(Arguments... arguments) {
        const std::scoped_lock lock(mutex);
        if (needs != NOTHING && !initialized) return NOT_INITIALIZED;
        if (needs == CONTEXT && !in_context()) return INVALID_CONTEXT;
        return function(arguments...);
    }
};

template <auto function, Needs needs = CONTEXT>
void* entry() {
    return reinterpret_cast<void*>(Guarded<function, needs>::call);
}

const std::map<std::string, void*> ENTRIES = {
    {"cuInit", entry<init, NOTHING>()},
    {"cuDriverGetVersion", entry<driver_get_version, NOTHING>()},
    {"cuDeviceGet", entry<device_get, INITIALIZED>()},
    {"cuDeviceGetAttribute", entry<device_get_attribute, INITIALIZED>()},
    {"cuDevicePrimaryCtxRetain", entry<primary_retain, INITIALIZED>()},
    {"cuDevicePrimaryCtxRelease", entry<primary_release, INITIALIZED>()},
    {"cuCtxGetCurrent", entry<context_get, INITIALIZED>()},
    {"cuCtxPushCurrent", entry<context_push, INITIALIZED>()},
    {"cuCtxPopCurrent", entry<context_pop, INITIALIZED>()},
    {"cuCtxSetCurrent", entry<context_set, INITIALIZED>()},
    {"cuCtxGetDevice", entry<context_device>()},
    {"cuCtxSynchronize", entry<context_synchronize>()},
    {"cuMemAlloc", entry<allocate>()},
    {"cuMemFree", entry<free_memory>()},
    {"cuMemGetInfo", entry<memory_info>()},
    {"cuMemsetD8Async", entry<fill>()},
    {"cuMemcpyHtoD", entry<copy_in_and_wait>()},
    {"cuMemcpyDtoH", entry<copy_out_and_wait>()},
    {"cuMemcpyHtoDAsync", entry<copy_in>()},
    {"cuMemcpyDtoHAsync", entry<copy_out>()},
    {"cuMemcpyDtoDAsync", entry<copy_inside>()},
    {"cuStreamCreate", entry<stream_create>()},
    {"cuStreamDestroy", entry<stream_destroy>()},
    {"cuStreamSynchronize", entry<stream_synchronize>()},
    {"cuStreamBeginCapture", entry<begin_capture>()},
    {"cuStreamEndCapture", entry<end_capture>()},
    {"cuGraphInstantiateWithFlags", entry<graph_instantiate>()},
    {"cuGraphLaunch", entry<graph_launch>()},
    {"cuGraphDestroy", entry<graph_destroy>()},
    {"cuGraphExecDestroy", entry<executable_destroy>()},
    {"cuEventCreate", entry<event_create>()},
    {"cuEventRecord", entry<event_record>()},
    {"cuEventSynchronize", entry<event_synchronize>()},
    {"cuEventElapsedTime", entry<event_elapsed>()},
    {"cuEventDestroy", entry<event_destroy>()},
    {"cuModuleLoadData", entry<module_load>()},
    {"cuModuleUnload", entry<module_unload>()},
    {"cuModuleGetFunction", entry<module_get_function>()},
    {"cuLaunchKernel", entry<launch_kernel>()},
};

}  // namespace

// Since CUDA 13.0 some names have another form besides, which is not here.
extern "C" int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status) {
    const auto found = ENTRIES.find(name);
    const bool known = found != ENTRIES.end() && version < 13000;
    *function = known ? found->second : nullptr;
    if (status) *status = known ? 0 : 1;
    return known ? SUCCESS : NOT_FOUND;
}

// What was made and not given back, as JSON.
extern "C" const char* stub_held() {
    static std::string told;
    const std::scoped_lock lock(mutex);
    std::ostringstream all;
    all << "{\"contexts\": " << retained << ", \"memory\": " << memory.size() << ", \"streams\": " << streams.held.size()
        << ", \"graphs\": " << graphs.held.size() + executables.held.size() << ", \"events\": " << events.held.size()
        << ", \"modules\": " << modules.held.size() << "}";
    return (told = all.str()).c_str();
}
