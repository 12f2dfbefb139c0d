# STTS_VERSION, as Python has it, and its leading numbers for project().

set(_file "${CMAKE_CURRENT_SOURCE_DIR}/stts_export/_version.py")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_file}")
file(STRINGS "${_file}" _line REGEX "^__version__ = ")
if(NOT _line MATCHES "^__version__ = \"(([0-9]+(\\.[0-9]+)+)[^\"]*)\"$")
    message(FATAL_ERROR "${_file} has no line __version__ = \"1.2.3\"")
endif()
set(STTS_VERSION "${CMAKE_MATCH_1}")
set(STTS_VERSION_NUMBER "${CMAKE_MATCH_2}")
