// Messages must reach the logger of every TensorRT generation, and never throw. Arguments: the
// libraries made of fake_tensorrt.cpp.
#include "plugin_log.h"

#include <cstring>

#include "check.h"
#include "fake_tensorrt.h"

namespace {

// A finder of unknown origin: this program tells no version.
class Stranger {
  public:
    virtual void* findLogger() {
        was_asked = true;
        return nullptr;
    }
    bool was_asked = false;

  protected:
    ~Stranger() = default;
};

class StrangeFinder final : public Stranger {};

void reaches(const stts::FakeTensorRT& tensorrt) {
    stts::rememberLoggerFinder(tensorrt.finder());
    tensorrt.clear();
    stts::logError("%s has %d", "scores", 3);
    CHECK(std::strcmp(tensorrt.lastMessage(), "scores has 3") == 0);

    tensorrt.clear(true);
    stts::logError("the finder throws: this goes to stderr");
    CHECK(std::strcmp(tensorrt.lastMessage(), "") == 0);

    tensorrt.clear();
    stts::rememberLoggerFinder(nullptr);
    stts::logError("no finder: this goes to stderr");
    CHECK(std::strcmp(tensorrt.lastMessage(), "") == 0);
}

}  // namespace

int main(int count, char** libraries) {
    CHECK(count > 1);
    for (int i = 1; i < count; ++i) reaches(stts::FakeTensorRT(libraries[i]));

    StrangeFinder stranger;
    stts::rememberLoggerFinder(&stranger);
    stts::logError("a finder of unknown layout: this goes to stderr");
    CHECK(!stranger.was_asked);
    return stts::exitCode();
}
