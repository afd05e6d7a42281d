// Registers a CUDA device that does nothing, with a build of PyTorch that knows no CUDA.
//
// Where PyTorch meets a tensor on cuda:0 it asks two objects about the device: a device guard (which device and stream
// are current, and what happened on a stream) and the CUDA hooks (is there a GPU, and how many). A CPU build has neither
// and raises. These answer that there is one GPU, on which everything has always just finished. Nothing here allocates
// or computes: that is left to FakeTensorMode, which follows shapes, dtypes and devices alone. See null_cuda.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device the_device(c10::DeviceType::CUDA, 0);
const c10::Stream the_stream(c10::Stream::DEFAULT, the_device);
int an_event;  // only its address is used: an event that was recorded is a pointer that is not null

struct NullGuard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::DeviceType::CUDA;
  }

  // The current device. There is one, so setting it changes nothing.
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  c10::Device getDevice() const override {
    return the_device;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return the_device;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  // The current stream. There is one, so nothing ever waits.
  c10::Stream getStream(c10::Device) const override {
    return the_stream;
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return the_stream;
  }
  c10::Stream exchangeStream(c10::Stream) const override {
    return the_stream;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  // Events, by which the backward pass and the caching allocator order streams.
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = &an_event;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct NullHooks final : public at::CUDAHooksInterface {
  explicit NullHooks(at::CUDAHooksArgs) {}

  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }

  // The CPU's generators stand in for a GPU's, as nothing is drawn.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

}  // namespace

namespace at {

// PyTorch looks this name up once, at the first question about CUDA: so this library is loaded before it.
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NullHooks)

}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, NullGuard)
