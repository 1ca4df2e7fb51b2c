# Completes `python -m stages ...`, whichever python; all else that python takes is completed as before.
declare -F _completion_loader > /dev/null && _completion_loader python
_lora_stages_before=$(complete -p python 2> /dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
[[ $_lora_stages_before == _lora_stages ]] && _lora_stages_before=

_lora_stages() {
    if [[ $COMP_CWORD -lt 3 || ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != stages ]]; then
        [[ -n $_lora_stages_before ]] && "$_lora_stages_before" "$@"
        return
    fi
    local IFS=$'\n' type value line
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o filenames; COMPREPLY+=($(compgen -f -- "${2#=}")) ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(
        IFS=' '
        COMP_WORDS="stages ${COMP_WORDS[*]:3}" COMP_CWORD=$((COMP_CWORD - 2)) \
            _LORA_STAGES_COMPLETE=bash_complete "${1/#\~/$HOME}" -m stages 2> /dev/null
    )
}

complete -o bashdefault -o default -o nosort -F _lora_stages python python3
