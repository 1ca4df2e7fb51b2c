# Completes `python -m stages ...`, whichever python; all else that python takes is completed as before.
_lora_stages() {
    if [[ $CURRENT -lt 4 || ${words[2]} != -m || ${words[3]} != stages ]]; then
        (( $+functions[_python] )) && { _python "$@"; return }
        _default
        return
    fi
    local -a plain described response
    local type key help
    response=("${(@f)$(COMP_WORDS="stages ${words[4,-1]}" COMP_CWORD=$((CURRENT - 3)) \
        _LORA_STAGES_COMPLETE=zsh_complete ${~words[1]} -m stages 2> /dev/null)}")
    for type key help in $response; do
        case $type in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain) if [[ $help == _ ]]; then plain+=("$key"); else described+=("$key:$help"); fi ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#plain )) && compadd -U -V unsorted -a plain
}

(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _lora_stages python python3
