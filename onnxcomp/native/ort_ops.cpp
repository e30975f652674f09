// The domain `onnxcomp.native` of custom ops for ONNX Runtime on the CPU: the list of its ops, and their registration.

#include "ort_delta_conv.h"
#include "ort_delta_point.h"
#include "ort_delta_pool.h"
#include "ort_delta_rnn.h"
#include "ort_nm.h"
#include "ort_sparse.h"

namespace {

using namespace onnxcomp;

constexpr const char* kDomain = "onnxcomp.native";

#define ONNXCOMP_NAME(op)                          \
  struct Named##op {                               \
    static constexpr const char* kName = #op;      \
  }

ONNXCOMP_NAME(ThresholdMatMul);
ONNXCOMP_NAME(ThresholdMatMulInt8);
ONNXCOMP_NAME(ThresholdMatMulInt4);
ONNXCOMP_NAME(TopKMatMul);
ONNXCOMP_NAME(TopKMatMulInt8);
ONNXCOMP_NAME(TopKMatMulInt4);
ONNXCOMP_NAME(GatedMLP);
ONNXCOMP_NAME(GatedMLPInt8);
ONNXCOMP_NAME(GatedMLPInt4);
ONNXCOMP_NAME(KeepAbove);
ONNXCOMP_NAME(KeepLargest);
ONNXCOMP_NAME(NMMatMul);
ONNXCOMP_NAME(NMMatMulInt8);
ONNXCOMP_NAME(DeltaAdd);
ONNXCOMP_NAME(DeltaMul);
ONNXCOMP_NAME(DeltaMatMul);
ONNXCOMP_NAME(DeltaMatMulInt8);
ONNXCOMP_NAME(DeltaGRU);
ONNXCOMP_NAME(DeltaGRUInt8);
ONNXCOMP_NAME(DeltaLSTM);
ONNXCOMP_NAME(DeltaLSTMInt8);

const ort::CustomOp kOps[] = {
    describe<SparseMatMul<NamedThresholdMatMul, RowsF32, AboveThreshold>>(),
    describe<SparseMatMul<NamedThresholdMatMulInt8, RowsInt8, AboveThreshold>>(),
    describe<SparseMatMul<NamedThresholdMatMulInt4, RowsInt4, AboveThreshold>>(),
    describe<SparseMatMul<NamedTopKMatMul, RowsF32, Largest>>(),
    describe<SparseMatMul<NamedTopKMatMulInt8, RowsInt8, Largest>>(),
    describe<SparseMatMul<NamedTopKMatMulInt4, RowsInt4, Largest>>(),
    describe<GatedMlp<NamedGatedMLP, DotsF32, RowsF32>>(),
    describe<GatedMlp<NamedGatedMLPInt8, DotsInt8, RowsInt8>>(),
    describe<GatedMlp<NamedGatedMLPInt4, DotsInt4, RowsInt4>>(),
    describe<Keep<NamedKeepAbove, AboveThreshold>>(),
    describe<Keep<NamedKeepLargest, Largest>>(),
    describe<NmMatMul<NamedNMMatMul, NmFloat>>(),
    describe<NmMatMul<NamedNMMatMulInt8, NmInt8>>(),
    describe<DeltaEnter>(),
    describe<DeltaConv>(),
    describe<DeltaPool>(),
    describe<DeltaGlobalPool>(),
    describe<DeltaBinary<NamedDeltaAdd, false>>(),
    describe<DeltaBinary<NamedDeltaMul, true>>(),
    describe<DeltaConcat>(),
    describe<DeltaSlice>(),
    describe<DeltaUnary>(),
    describe<DeltaResize>(),
    describe<DeltaMatMul<NamedDeltaMatMul, RowsF32>>(),
    describe<DeltaMatMul<NamedDeltaMatMulInt8, RowsInt8>>(),
    describe<DeltaGru<NamedDeltaGRU, RowsF32>>(),
    describe<DeltaGru<NamedDeltaGRUInt8, RowsInt8>>(),
    describe<DeltaLstm<NamedDeltaLSTM, RowsF32>>(),
    describe<DeltaLstm<NamedDeltaLSTMInt8, RowsInt8>>(),
};

ort::Status* add_ops(const ort::Api* api, ort::CustomOpDomain* domain) {
  for (const ort::CustomOp& op : kOps) ONNXCOMP_RETURN_IF_ERROR(call<ort::CustomOpDomain_Add>(api, domain, &op));
  return nullptr;
}

ort::Status* add_domain(const ort::Api* api, ort::SessionOptions* options) {
  // The runtime refuses two domains of one name only when a session is made, with an obscure message. A mark in the
  // options makes registering twice harmless.
  constexpr const char* kMark = "onnxcomp.native.registered";
  int registered = 0;
  ONNXCOMP_RETURN_IF_ERROR(
      call<ort::HasSessionConfigEntry>(api, static_cast<const ort::SessionOptions*>(options), kMark, &registered));
  if (registered != 0) return nullptr;

  // One domain for the whole process, never released: every session made from any of the options refers to it.
  static std::atomic<ort::CustomOpDomain*> shared{nullptr};
  ort::CustomOpDomain* domain = shared.load(std::memory_order_acquire);
  if (domain == nullptr) {
    ort::CustomOpDomain* mine = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::CreateCustomOpDomain>(api, kDomain, &mine));
    if (ort::Status* status = add_ops(api, mine)) {
      call<ort::ReleaseCustomOpDomain>(api, mine);
      return status;
    }
    if (shared.compare_exchange_strong(domain, mine, std::memory_order_acq_rel)) {
      domain = mine;
    } else {
      call<ort::ReleaseCustomOpDomain>(api, mine);  // another thread was first
    }
  }
  ONNXCOMP_RETURN_IF_ERROR(call<ort::AddCustomOpDomain>(api, options, domain));
  return call<ort::AddSessionConfigEntry>(api, options, kMark, "1");
}

}  // namespace

#if defined(_WIN32)
#define ONNXCOMP_EXPORT extern "C" __declspec(dllexport)
#else
#define ONNXCOMP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The runtime looks this function up when the library is registered with `SessionOptions`.
ONNXCOMP_EXPORT ort::Status* ONNXCOMP_ORT_CALL RegisterCustomOps(ort::SessionOptions* options,
                                                                 const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    char text[128];
    std::snprintf(text, sizeof(text), "onnxcomp needs ONNX Runtime 1.17 or newer; this is %s", base->GetVersionString());
    // Version 1 of the table is in every runtime, and all that is needed of it is its first slot.
    return call<ort::CreateStatus>(base->GetApi(1), ort::ErrorCode::kFail, static_cast<const char*>(text));
  }
  g_api.store(api, std::memory_order_release);
  return add_domain(api, options);
}
