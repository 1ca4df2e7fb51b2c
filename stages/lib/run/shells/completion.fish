# Completes `python -m stages ...`, whichever python; all else that python takes is completed as before.
function __lora_stages_asked
    set -l words (commandline -opc)
    test (count $words) -ge 3; and test "$words[2]" = -m; and test "$words[3]" = stages
end

function __lora_stages
    set -l words (commandline -opc)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l word (commandline -ct)
    for line in (env _LORA_STAGES_COMPLETE=fish_complete \
            COMP_WORDS="stages "(string join ' ' -- (string escape -- $words[4..-1]) $word) \
            COMP_CWORD="$word" $program -m stages 2> /dev/null)
        set -l found (string split -m 1 , -- $line)
        switch $found[1]
            case dir
                __fish_complete_directories $word
            case file
                __fish_complete_path $word
            case plain
                echo $found[2]
        end
    end
end

for program in python python3
    complete --command $program --condition __lora_stages_asked --no-files --arguments '(__lora_stages)'
end
