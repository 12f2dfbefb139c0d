// Calls every virtual function of classes made with our interface header, through TensorRT's
// header: each call must reach the function of its name with its arguments, and the answer come
// back. Built only where there are real headers.
#include "interface_calls.h"

#include <NvInferRuntime.h>

#include <cstring>

#include "check.h"
#include "fake_expressions.h"

namespace {

using namespace nvinfer1;

template <class... Arguments>
bool wasCalled(const char* function, Arguments... arguments) {
    return std::strcmp(last_call.function, function) == 0 &&
           last_call.arguments == std::vector<intptr_t>{(intptr_t)arguments...};
}

template <class Class>
Class* somewhere(intptr_t address) {
    return reinterpret_cast<Class*>(address);
}

bool isText(const char* text, const char* expected) { return std::strcmp(text, expected) == 0; }

// A qualified call runs the function of TensorRT's header, an ordinary one that of ours.
template <class Interface>
bool tellsTheSame(const Interface& own) {
    const InterfaceInfo ours = own.getInterfaceInfo();
    const InterfaceInfo theirs = own.Interface::getInterfaceInfo();
    return isText(ours.kind, theirs.kind) && ours.major == theirs.major &&
           ours.minor == theirs.minor && own.getAPILanguage() == own.Interface::getAPILanguage();
}

void hasTheSameDefaults() {
    auto& build = *static_cast<IPluginV3OneBuild*>(ownPlainBuild());
    CHECK(build.getWorkspaceSize(nullptr, 0, nullptr, 0) ==
          build.IPluginV3OneBuild::getWorkspaceSize(nullptr, 0, nullptr, 0));
    CHECK(build.getValidTactics(nullptr, 0) ==
          build.IPluginV3OneBuild::getValidTactics(nullptr, 0));
    CHECK(build.getNbTactics() == build.IPluginV3OneBuild::getNbTactics());
    CHECK(build.getTimingCacheID() == build.IPluginV3OneBuild::getTimingCacheID());
    CHECK(build.getFormatCombinationLimit() ==
          build.IPluginV3OneBuild::getFormatCombinationLimit());
    CHECK(build.getMetadataString() == build.IPluginV3OneBuild::getMetadataString());
    auto& runtime = *static_cast<IPluginV3OneRuntime*>(ownPlainRuntime());
    CHECK(runtime.setTactic(3) == runtime.IPluginV3OneRuntime::setTactic(3));
}

void callsPlugin() {
    auto* plugin = static_cast<IPluginV3*>(ownPlugin());
    CHECK(tellsTheSame(*plugin));
    CHECK(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME) == kOwnPointer);
    CHECK(wasCalled("getCapabilityInterface", 2));
    CHECK(plugin->clone() == kOwnPointer && wasCalled("clone"));
    delete plugin;
    CHECK(wasCalled("~Plugin"));
}

void callsCore() {
    auto& core = *static_cast<IPluginV3OneCore*>(ownCore());
    CHECK(tellsTheSame(core));
    CHECK(isText(core.getPluginName(), "name"));
    CHECK(isText(core.getPluginVersion(), "version"));
    CHECK(isText(core.getPluginNamespace(), "namespace"));
}

void callsBuild() {
    auto& build = *static_cast<IPluginV3OneBuild*>(ownBuild());
    const auto* in = somewhere<DynamicPluginTensorDesc>(0x100);
    const auto* out = somewhere<DynamicPluginTensorDesc>(0x200);
    CHECK(tellsTheSame(build));
    CHECK(build.configurePlugin(in, 1, out, 2) == kOwnStatus);
    CHECK(wasCalled("configurePlugin", in, 1, out, 2));
    auto* types = somewhere<DataType>(0x300);
    CHECK(build.getOutputDataTypes(types, 3, types + 1, 4) == kOwnStatus);
    CHECK(wasCalled("getOutputDataTypes", types, 3, types + 1, 4));
    auto* shapes = somewhere<DimsExprs>(0x400);
    stts::FakeBuilder builder;
    IExprBuilder& base = builder;
    CHECK(build.getOutputShapes(shapes, 1, shapes + 1, 2, shapes + 2, 3, base) == kOwnStatus);
    CHECK(wasCalled("getOutputShapes", shapes, 1, shapes + 1, 2, shapes + 2, 3, &base));
    CHECK(build.supportsFormatCombination(5, in, 6, 7));
    CHECK(wasCalled("supportsFormatCombination", 5, in, 6, 7));
    CHECK(build.getNbOutputs() == 11);
    CHECK(build.getWorkspaceSize(in, 1, out, 2) == size_t{1} << 40);
    CHECK(wasCalled("getWorkspaceSize", in, 1, out, 2));
    auto* tactics = somewhere<int32_t>(0x500);
    CHECK(build.getValidTactics(tactics, 8) == kOwnStatus);
    CHECK(wasCalled("getValidTactics", tactics, 8));
    CHECK(build.getNbTactics() == 12);
    CHECK(isText(build.getTimingCacheID(), "timing"));
    CHECK(build.getFormatCombinationLimit() == 13);
    CHECK(isText(build.getMetadataString(), "metadata"));
}

void callsRuntime() {
    auto& runtime = *static_cast<IPluginV3OneRuntime*>(ownRuntime());
    const auto* in = somewhere<PluginTensorDesc>(0x100);
    const auto* out = somewhere<PluginTensorDesc>(0x200);
    CHECK(tellsTheSame(runtime));
    CHECK(runtime.setTactic(9) == kOwnStatus && wasCalled("setTactic", 9));
    CHECK(runtime.onShapeChange(in, 1, out, 2) == kOwnStatus);
    CHECK(wasCalled("onShapeChange", in, 1, out, 2));
    auto* inputs = somewhere<const void* const>(0x300);
    auto* outputs = somewhere<void* const>(0x400);
    auto* workspace = somewhere<void>(0x500);
    auto* stream = somewhere<CUstream_st>(0x600);
    CHECK(runtime.enqueue(in, out, inputs, outputs, workspace, stream) == kOwnStatus);
    CHECK(wasCalled("enqueue", in, out, inputs, outputs, workspace, stream));
    auto* context = somewhere<IPluginResourceContext>(0x700);
    CHECK(runtime.attachToContext(context) == kOwnPointer);
    CHECK(wasCalled("attachToContext", context));
    CHECK(runtime.getFieldsToSerialize() == kOwnPointer);
}

void callsCreator() {
    auto* base = static_cast<IPluginCreatorInterface*>(ownCreator());
    auto& creator = *static_cast<IPluginCreatorV3One*>(base);
    CHECK(tellsTheSame(creator));
    const char* name = "layer";
    const auto* fields = somewhere<PluginFieldCollection>(0x100);
    CHECK(creator.createPlugin(name, fields, TensorRTPhase::kRUNTIME) == kOwnPointer);
    CHECK(wasCalled("createPlugin", name, fields, 1));
    CHECK(creator.getFieldNames() == kOwnPointer);
    CHECK(isText(creator.getPluginName(), "name"));
    CHECK(isText(creator.getPluginVersion(), "version"));
    CHECK(isText(creator.getPluginNamespace(), "namespace"));
}

void lendsExpressions() {
    stts::FakeBuilder builder;
    IExprBuilder& base = builder;
    CHECK(usesForeignExpressions(&base));
    CHECK(builder.sizeTensor() == 9 && builder.sizeOpt() == 20 && builder.sizeUpper() == 23);
}

}  // namespace

int main() {
    hasTheSameDefaults();
    callsPlugin();
    callsCore();
    callsBuild();
    callsRuntime();
    callsCreator();
    lendsExpressions();
    return stts::exitCode();
}
