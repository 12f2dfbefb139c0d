// A plugin of our interface header that remembers how it was called.
#include "interface_calls.h"

#define nvinfer1 stts_interface
#include "interface/NvInferPluginInterface.h"

Call last_call{};

namespace {

using namespace stts_interface;

const int kTarget = 0;

template <class... Arguments>
void remember(const char* function, Arguments... arguments) {
    last_call = {function, {(intptr_t)arguments...}};
}

template <class Pointer>
Pointer ownPointer() {
    return static_cast<Pointer>(const_cast<void*>(kOwnPointer));
}

class Plugin final : public IPluginV3 {
  public:
    ~Plugin() noexcept override { remember("~Plugin"); }
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        remember("getCapabilityInterface", type);
        return ownPointer<IPluginCapability*>();
    }
    IPluginV3* clone() noexcept override {
        remember("clone");
        return ownPointer<IPluginV3*>();
    }
};

class Core final : public IPluginV3OneCore {
  public:
    const char* getPluginName() const noexcept override { return "name"; }
    const char* getPluginVersion() const noexcept override { return "version"; }
    const char* getPluginNamespace() const noexcept override { return "namespace"; }
};

class Build final : public IPluginV3OneBuild {
  public:
    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                            const DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) noexcept override {
        remember("configurePlugin", in, nbInputs, out, nbOutputs);
        return kOwnStatus;
    }
    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                               int32_t nbInputs) const noexcept override {
        remember("getOutputDataTypes", outputTypes, nbOutputs, inputTypes, nbInputs);
        return kOwnStatus;
    }
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs,
                            IExprBuilder& exprBuilder) noexcept override {
        remember("getOutputShapes", inputs, nbInputs, shapeInputs, nbShapeInputs, outputs,
                 nbOutputs, &exprBuilder);
        return kOwnStatus;
    }
    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                   int32_t nbInputs, int32_t nbOutputs) noexcept override {
        remember("supportsFormatCombination", pos, inOut, nbInputs, nbOutputs);
        return true;
    }
    int32_t getNbOutputs() const noexcept override { return 11; }
    size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                            const DynamicPluginTensorDesc* outputs,
                            int32_t nbOutputs) const noexcept override {
        remember("getWorkspaceSize", inputs, nbInputs, outputs, nbOutputs);
        return size_t{1} << 40;
    }
    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override {
        remember("getValidTactics", tactics, nbTactics);
        return kOwnStatus;
    }
    int32_t getNbTactics() noexcept override { return 12; }
    const char* getTimingCacheID() noexcept override { return "timing"; }
    int32_t getFormatCombinationLimit() noexcept override { return 13; }
    const char* getMetadataString() noexcept override { return "metadata"; }
};

class Runtime final : public IPluginV3OneRuntime {
  public:
    int32_t setTactic(int32_t tactic) noexcept override {
        remember("setTactic", tactic);
        return kOwnStatus;
    }
    int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override {
        remember("onShapeChange", in, nbInputs, out, nbOutputs);
        return kOwnStatus;
    }
    int32_t enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        remember("enqueue", inputDesc, outputDesc, inputs, outputs, workspace, stream);
        return kOwnStatus;
    }
    IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override {
        remember("attachToContext", context);
        return ownPointer<IPluginV3*>();
    }
    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        return ownPointer<const PluginFieldCollection*>();
    }
};

class PlainBuild final : public IPluginV3OneBuild {
  public:
    int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                            int32_t) noexcept override {
        return 0;
    }
    int32_t getOutputDataTypes(DataType*, int32_t, const DataType*,
                               int32_t) const noexcept override {
        return 0;
    }
    int32_t getOutputShapes(const DimsExprs*, int32_t, const DimsExprs*, int32_t, DimsExprs*,
                            int32_t, IExprBuilder&) noexcept override {
        return 0;
    }
    bool supportsFormatCombination(int32_t, const DynamicPluginTensorDesc*, int32_t,
                                   int32_t) noexcept override {
        return true;
    }
    int32_t getNbOutputs() const noexcept override { return 1; }
};

class PlainRuntime final : public IPluginV3OneRuntime {
  public:
    int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                          int32_t) noexcept override {
        return 0;
    }
    int32_t enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const*,
                    void* const*, void*, cudaStream_t) noexcept override {
        return 0;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return nullptr; }
    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return nullptr; }
};

class Creator final : public IPluginCreatorV3One {
  public:
    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fc,
                            TensorRTPhase phase) noexcept override {
        remember("createPlugin", name, fc, phase);
        return ownPointer<IPluginV3*>();
    }
    const PluginFieldCollection* getFieldNames() noexcept override {
        return ownPointer<const PluginFieldCollection*>();
    }
    const char* getPluginName() const noexcept override { return "name"; }
    const char* getPluginVersion() const noexcept override { return "version"; }
    const char* getPluginNamespace() const noexcept override { return "namespace"; }
};

}  // namespace

const void* const kOwnPointer = &kTarget;

void* ownPlugin() { return static_cast<IPluginV3*>(new Plugin); }

void* ownCore() {
    static Core core;
    return static_cast<IPluginV3OneCore*>(&core);
}

void* ownBuild() {
    static Build build;
    return static_cast<IPluginV3OneBuild*>(&build);
}

void* ownRuntime() {
    static Runtime runtime;
    return static_cast<IPluginV3OneRuntime*>(&runtime);
}

void* ownCreator() {
    static Creator creator;
    return static_cast<IPluginCreatorInterface*>(&creator);
}

void* ownPlainBuild() {
    static PlainBuild build;
    return static_cast<IPluginV3OneBuild*>(&build);
}

void* ownPlainRuntime() {
    static PlainRuntime runtime;
    return static_cast<IPluginV3OneRuntime*>(&runtime);
}

bool usesForeignExpressions(void* builder) {
    auto& foreign = *static_cast<IExprBuilder*>(builder);
    const IDimensionExpr* product =
        foreign.operation(DimensionOperation::kPROD, *foreign.constant(4), *foreign.constant(5));
    const IDimensionExpr* sum =
        foreign.operation(DimensionOperation::kSUM, *foreign.constant(3), *product);
    const IDimensionExpr* size = foreign.declareSizeTensor(9, *product, *sum);
    return sum->isConstant() && !sum->isSizeTensor() && sum->getConstantValue() == 23 &&
           size->isSizeTensor() && !size->isConstant();
}
