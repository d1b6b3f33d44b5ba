// Pictures through an ONNX file that rarefy exported, by ONNX Runtime's C API: with_onnxruntime model.onnx PICTURE...
#include "answer.hpp"
#include "third_party/onnxruntime_c_api.h"

static const OrtApi* api;

static void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

static Json description(OrtSession* session, OrtAllocator* memory) {
  OrtModelMetadata* metadata;
  check(api->SessionGetModelMetadata(session, &metadata));
  char* text = nullptr;
  check(api->ModelMetadataLookupCustomMetadataMap(metadata, memory, "rarefy", &text));
  api->ReleaseModelMetadata(metadata);
  if (!text) throw std::runtime_error("the file does not say how it is fed; export it with rarefy");
  const Json about = Json::parse(text);
  memory->Free(memory, text);
  return about;
}

int main(int count, char** arguments) {
  return guarded(count, arguments, [&](const std::string& model) {
    api = OrtGetApiBase()->GetApi(16);  // every library since 1.16 has it
    if (!api) throw std::runtime_error("the library is older than ONNX Runtime 1.16; install a newer one");
    OrtEnv* environment;
    OrtSessionOptions* options;
    OrtSession* session;
    OrtAllocator* memory;
    OrtMemoryInfo* place;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "rarefy", &environment));
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, 1));
    check(api->CreateSession(environment, model.c_str(), options, &session));
    check(api->GetAllocatorWithDefaultOptions(&memory));
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &place));
    const Json about = description(session, memory);
    const std::string input = about["inputs"][0]["name"].text, output = about["answer"].text;
    const auto type = about.has("feed") ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    const Run run = [&](const void* data, size_t bytes, const std::vector<int64_t>& shape) {
      OrtValue *given, *found = nullptr;
      OrtTensorTypeAndShapeInfo* info;
      float* numbers;
      size_t size;
      check(api->CreateTensorWithDataAsOrtValue(place, const_cast<void*>(data), bytes, shape.data(), shape.size(), type, &given));
      const char *inputs[] = {input.c_str()}, *outputs[] = {output.c_str()};
      check(api->Run(session, nullptr, inputs, &given, 1, outputs, 1, &found));
      check(api->GetTensorMutableData(found, reinterpret_cast<void**>(&numbers)));
      check(api->GetTensorTypeAndShape(found, &info));
      check(api->GetTensorShapeElementCount(info, &size));
      std::vector<float> answer(numbers, numbers + size);
      api->ReleaseTensorTypeAndShapeInfo(info);
      api->ReleaseValue(found);
      api->ReleaseValue(given);
      return answer;
    };
    for (int i = 2; i < count; ++i) show(arguments[i], about, run);
    api->ReleaseMemoryInfo(place);
    api->ReleaseSession(session);
    api->ReleaseSessionOptions(options);
    api->ReleaseEnv(environment);
  });
}
